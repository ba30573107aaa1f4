#pragma once

#include <sndfile.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <utility>

#include "headroom/audio/container.hpp"
#include "headroom/audio/sound_file.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"

namespace headroom::inline v0::audio {

namespace detail {

/// The kinds of files whose length is checked, see container_length; of the others that libsndfile knows nobody could
/// tell that they are cut.
inline bool is_checked_kind(int format) {
  constexpr int kMpeg = 0x230000;  // SF_FORMAT_MPEG, since libsndfile 1.1
  switch (format & SF_FORMAT_TYPEMASK) {
    case SF_FORMAT_WAV:
    case SF_FORMAT_WAVEX:
    case SF_FORMAT_RF64:
    case SF_FORMAT_W64:
    case SF_FORMAT_AIFF:
    case SF_FORMAT_AU:
    case SF_FORMAT_CAF:
    case SF_FORMAT_FLAC:
    case SF_FORMAT_OGG:
    case kMpeg:
      return true;
    default:
      return false;
  }
}

/// Bytes of a sample as it is stored; 0 where samples have no size of their own.
inline int stored_sample_bytes(int format) {
  switch (format & SF_FORMAT_SUBMASK) {
    case SF_FORMAT_PCM_S8:
    case SF_FORMAT_PCM_U8:
    case SF_FORMAT_ULAW:
    case SF_FORMAT_ALAW:
      return 1;
    case SF_FORMAT_PCM_16:
      return 2;
    case SF_FORMAT_PCM_24:
      return 3;
    case SF_FORMAT_PCM_32:
    case SF_FORMAT_FLOAT:
      return 4;
    case SF_FORMAT_DOUBLE:
      return 8;
    default:
      return 0;
  }
}

}  // namespace detail

/// Whether opening a file also checks that it is whole, for which some kinds have to be read from end to end.
enum class WholeFile {
  check,
  known  ///< it was checked before
};

/// Whether an error is one of an audio file, which is missing, damaged or no audio.
inline bool is_file_error(const Error& error) { return error.id().starts_with("headroom.audio.file."); }

/// Reads an audio file piece by piece: WAV, RF64, Wave64, AIFF, AU, CAF, FLAC, Ogg and MP3, also out of a pipe, see
/// io::InputFile.
class AudioReader {
 public:
  /// Opens `path`. Throws `headroom.audio.file.missing` (not there, or nothing that can be read, with the reason),
  /// `file.empty` (no bytes or no samples), `file.format` (not audio), `file.truncated` (shorter than its header says),
  /// `file.length` (longer than its header says).
  explicit AudioReader(std::filesystem::path path, WholeFile whole = WholeFile::check)
      : path_(std::move(path)),
        input_(path_, {"headroom.audio.file.missing", "audio", "a WAV, FLAC, AIFF, Ogg or MP3 file"}) {
    require(input_.size() > 0, "headroom.audio.file.empty", path_,
            " has 0 bytes, expected audio; copy or download it again");
    std::optional<ContainerLength> length;
    if (whole == WholeFile::check) length = require_whole(input_, path_);
    file_.reset(sf_open_fd(input_.descriptor(), SFM_READ, &info_, /*close_desc=*/SF_FALSE));
    require(file_ != nullptr, "headroom.audio.file.format", path_, " can't be read as audio: ", sf_strerror(nullptr),
            " Expected WAV, FLAC, AIFF, Ogg or MP3; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    require(detail::is_checked_kind(info_.format), "headroom.audio.file.format", path_,
            " is of a kind that does not tell when its end is missing; expected WAV, FLAC, AIFF, Ogg or MP3; convert "
            "it, e.g. "
            "ffmpeg -i INPUT OUTPUT.wav");
    require(info_.frames != SF_COUNT_MAX, "headroom.audio.file.format", path_,
            " does not say how long it is; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    if (length && length->open_end) require_all_frames(*length->open_end);
    require(info_.frames > 0, "headroom.audio.file.empty", path_, " has no samples, expected at least 1");
  }

  const std::filesystem::path& path() const { return path_; }
  std::int64_t frames() const { return info_.frames; }  ///< samples of each channel
  int channels() const { return info_.channels; }
  int sample_rate() const { return info_.samplerate; }  ///< Hz
  std::int64_t position() const { return position_; }   ///< the frame that `read` returns next

  /// The next `read` begins at `frame`, 0 to frames(). Throws `headroom.audio.file.position`.
  void seek(std::int64_t frame) {
    require(frame >= 0 && frame <= frames() && sf_seek(file_.get(), frame, SEEK_SET) == frame,
            "headroom.audio.file.position", "can't go to frame ", frame, " of ", path_, ", expected 0 to ", frames(),
            " in a file that allows seeking");
    position_ = frame;
  }

  /// The next `frames` frames, or those that are left (none at the end): float [C,n], full scale is 1.
  /// Throws `headroom.audio.file.truncated`, `headroom.audio.file.not_finite`.
  torch::Tensor read(std::int64_t frames) {
    const std::int64_t n = std::clamp<std::int64_t>(frames, 0, info_.frames - position_);
    torch::Tensor result = torch::empty({channels(), n}, torch::kFloat);  // [C,n]
    for (std::int64_t done = 0; done < n;) {
      const std::int64_t count = std::min(n - done, detail::kFramesPerBlock);
      const torch::Tensor block = torch::empty({count, channels()}, torch::kFloat);  // [count,C]
      const std::int64_t got = sf_readf_float(file_.get(), block.data_ptr<float>(), count);
      require(got == count, "headroom.audio.file.truncated", path_, " ends at frame ", position_ + got,
              ", its header says ", info_.frames, "; copy or download it again");
      detail::require_finite(block.data_ptr<float>(), block.numel(), channels(), position_, sample_rate(), path_,
                             "write the file again from its source");
      result.narrow(1, done, count).copy_(block.t());
      done += count;
      position_ += count;
    }
    return result;
  }

 private:
  /// Where samples go on to the end of the file, libsndfile has to know of all of them.
  void require_all_frames(std::uint64_t open_end) const {
    const std::int64_t frame = std::int64_t{detail::stored_sample_bytes(info_.format)} * info_.channels;
    if (frame == 0) return;
    const auto there = static_cast<std::int64_t>(input_.size() - std::min(input_.size(), open_end)) / frame;
    require(info_.frames >= there, "headroom.audio.file.length", path_, " has about ", there,
            " frames and no length in its header, of which ", info_.frames,
            " can be read; write it again, e.g. ffmpeg -ignore_length 1 -i INPUT -rf64 auto OUTPUT.wav");
  }

  std::filesystem::path path_;
  io::InputFile input_;
  SF_INFO info_{};
  detail::SoundFile file_;
  std::int64_t position_ = 0;
};

/// Refuses a file of another sample rate. Throws `headroom.audio.file.sample_rate`.
inline void require_sample_rate(const AudioReader& reader, int sample_rate) {
  require(reader.sample_rate() == sample_rate, "headroom.audio.file.sample_rate", reader.path(), " has ",
          reader.sample_rate(), " Hz, expected ", sample_rate, "; convert it: sox INPUT -r ", sample_rate,
          " OUTPUT.wav");
}

}  // namespace headroom::inline v0::audio
