#pragma once

#include <sndfile.h>
#include <sys/stat.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/audio/container.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/input_file.hpp"

namespace headroom::inline v0::audio {

namespace detail {

struct CloseSoundFile {
  void operator()(SNDFILE* file) const { sf_close(file); }
};
using SoundFile = std::unique_ptr<SNDFILE, CloseSoundFile>;

inline constexpr std::int64_t kFramesPerBlock = 1 << 16;  ///< bounds the interleaved copies

/// Refuses NaN and infinity in `count` interleaved samples that begin at frame `first_frame`.
inline void require_finite(const float* samples, std::int64_t count, int channels, std::int64_t first_frame,
                           int sample_rate, const std::filesystem::path& path, const char* remedy) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (!core::detail::is_finite(samples[i])) [[unlikely]] {
      const std::int64_t frame = first_frame + i / channels;
      fail("headroom.audio.file.not_finite", path, " has a NaN or infinite sample at frame ", frame, " (",
           static_cast<double>(frame) / sample_rate, " s), channel ", i % channels, ", expected finite samples; ",
           remedy);
    }
  }
}

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

/// Refuses to begin writing `bytes` into the folder of `path` when there is less room.
inline void require_room(const std::filesystem::path& path, std::uint64_t bytes) {
  std::error_code no_answer;
  const auto space = std::filesystem::space(io::detail::folder_of(path), no_answer);
  require(no_answer || space.available >= bytes, "headroom.audio.file.full", path, " needs ", bytes, " bytes, ",
          io::detail::folder_of(path), " has room for ", space.available, "; free some room or choose another folder");
}

}  // namespace detail

/// Reads an audio file piece by piece: WAV, RF64, Wave64, AIFF, AU, CAF, FLAC, Ogg and MP3, also out of a pipe, see
/// io::InputFile.
class AudioReader {
 public:
  /// Opens `path`. Throws `headroom.audio.file.missing` (not there, or nothing that can be read, with the reason),
  /// `file.empty` (no bytes or no samples), `file.format` (not audio), `file.truncated` (shorter than its header says),
  /// `file.length` (longer than its header says).
  explicit AudioReader(std::filesystem::path path)
      : path_(std::move(path)),
        input_(path_, {"headroom.audio.file.missing", "audio", "a WAV, FLAC, AIFF or Ogg file"}) {
    require(input_.size() > 0, "headroom.audio.file.empty", path_,
            " has 0 bytes, expected audio; copy or download it again");
    require_whole(input_, path_);
    file_.reset(sf_open_fd(input_.descriptor(), SFM_READ, &info_, /*close_desc=*/SF_FALSE));
    require(file_ != nullptr, "headroom.audio.file.format", path_, " can't be read as audio: ", sf_strerror(nullptr),
            " Expected WAV, FLAC, AIFF or Ogg; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    require(
        detail::is_checked_kind(info_.format), "headroom.audio.file.format", path_,
        " is of a kind that does not tell when its end is missing; expected WAV, FLAC, AIFF or Ogg; convert it, e.g. "
        "ffmpeg -i INPUT OUTPUT.wav");
    require(info_.frames != SF_COUNT_MAX, "headroom.audio.file.format", path_,
            " does not say how long it is; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    require_all_frames();
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
  void require_all_frames() const {
    const auto length = container_length(input_);
    const std::int64_t frame = std::int64_t{detail::stored_sample_bytes(info_.format)} * info_.channels;
    if (!length || !length->open_end || frame == 0) return;
    const auto there = static_cast<std::int64_t>(input_.size() - std::min(input_.size(), *length->open_end)) / frame;
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

/// Refuses a file of another sample rate: this library does not resample. Throws `headroom.audio.file.sample_rate`.
inline void require_sample_rate(const AudioReader& reader, int sample_rate) {
  require(reader.sample_rate() == sample_rate, "headroom.audio.file.sample_rate", reader.path(), " has ",
          reader.sample_rate(), " Hz, expected ", sample_rate, "; convert it: sox INPUT -r ", sample_rate,
          " OUTPUT.wav");
}

/// How samples are stored in a WAV file. Integers are rounded to nearest without dither and clipped at full scale, so
/// that what was read from a file of the same kind is written back bit by bit.
enum class Encoding { pcm16, pcm24, float32 };

/// Bytes that a sample takes.
inline int bytes_per_sample(Encoding encoding) {
  return encoding == Encoding::pcm16 ? 2 : encoding == Encoding::pcm24 ? 3 : 4;
}

/// What an AudioWriter writes.
struct AudioFormat {
  int channels = 2;
  int sample_rate = 44100;  ///< Hz
  Encoding encoding = Encoding::float32;
};

/// Writes a WAV file of known length piece by piece; beyond 4 GiB it is RF64. The samples go to an io::AtomicFile,
/// which `close()` gives its name, so that `path` is either what it was or the whole new file. On an error, or without
/// `close()`, nothing is left of it.
class AudioWriter {
 public:
  /// `frames`: how many will be written. Throws `headroom.audio.file.options`, `headroom.audio.file.full` (the disk
  /// has less room than the file needs), `headroom.audio.file.write` (no such folder, no permission, a folder in its
  /// place).
  AudioWriter(std::filesystem::path path, const AudioFormat& format, std::int64_t frames)
      : output_(checked(std::move(path), format, frames), "headroom.audio.file.write"),
        format_(format),
        frames_(frames) {
    detail::require_room(output_.path(), data_bytes());
    constexpr std::uint64_t wav_limit = 0xffffffff - 4096;  // sizes have 32 bits; the rest is room for the header
    SF_INFO info{};
    info.channels = format.channels;
    info.samplerate = format.sample_rate;
    info.format = (data_bytes() > wav_limit ? SF_FORMAT_RF64 : SF_FORMAT_WAV) |
                  (format.encoding == Encoding::pcm16   ? SF_FORMAT_PCM_16
                   : format.encoding == Encoding::pcm24 ? SF_FORMAT_PCM_24
                                                        : SF_FORMAT_FLOAT);
    file_.reset(sf_open_fd(output_.descriptor(), SFM_WRITE, &info, /*close_desc=*/SF_FALSE));
    if (file_ == nullptr) {
      fail_to_write(sf_strerror(nullptr));
    }
    // The PEAK chunk holds the time of day: without it equal samples make equal files.
    sf_command(file_.get(), SFC_SET_ADD_PEAK_CHUNK, nullptr, SF_FALSE);
  }

  const std::filesystem::path& path() const { return output_.path(); }
  std::int64_t written() const { return written_; }  ///< frames so far
  std::int64_t clipped() const { return clipped_; }  ///< samples so far that the integer encoding had to clip

  /// Appends `samples` [C,n], full scale is 1, of any floating dtype and device. Throws `headroom.audio.file.samples`
  /// (shape, dtype, or after the end), `headroom.audio.file.not_finite`, `headroom.audio.file.write`.
  void write(const torch::Tensor& samples) {
    require(samples.dim() == 2 && samples.size(0) == format_.channels && samples.is_floating_point(),
            "headroom.audio.file.samples", "got samples ", samples.sizes(), " of ", samples.dtype().name(), " for ",
            path(), ", expected floating point [", format_.channels, ", n]");
    require(
        file_ != nullptr && written_ + samples.size(1) <= frames_, "headroom.audio.file.samples", "got ",
        samples.size(1), " more frames for ", path(), " after ", written_, " of ", frames_,
        file_ ? "; open the writer with the number of frames that will come" : "; the writer is closed, open another");
    for (std::int64_t done = 0; done < samples.size(1); done += detail::kFramesPerBlock) {
      const std::int64_t n = std::min(samples.size(1) - done, detail::kFramesPerBlock);
      const torch::Tensor block =
          samples.detach().narrow(1, done, n).t().to(torch::kCPU, torch::kFloat).contiguous();  // [n,C]
      const float* data = block.data_ptr<float>();
      detail::require_finite(data, block.numel(), format_.channels, written_, format_.sample_rate, path(),
                             "the file was not written: look for the source of the values, e.g. a diverged model");
      if (write_interleaved(data, n) != n) {
        fail_to_write(sf_strerror(file_.get()));
      }
      written_ += n;
    }
  }

  /// Finishes the file and puts it in place, replacing what was there: `finish` and `publish`. Throws
  /// `headroom.audio.file.incomplete` (fewer frames than promised), `headroom.audio.file.write`.
  void close() {
    finish();
    publish();
  }

  /// Puts the whole file onto the disk, without its name. Files that belong together are all finished first, then
  /// published: what can fail has succeeded for each by then. Throws like `close`.
  void finish() {
    require(file_ != nullptr, "headroom.audio.file.samples", path(), " is closed already");
    if (written_ != frames_) {
      file_.reset();
      output_.discard();
      fail("headroom.audio.file.incomplete", "got ", written_, " frames for ", path(), ", expected ", frames_,
           "; the file was not written");
    }
    const int error = sf_close(file_.release());
    struct stat status {};
    if (error != 0 || ::fstat(output_.descriptor(), &status) != 0 ||
        static_cast<std::uint64_t>(status.st_size) < data_bytes()) {
      fail_to_write(error != 0 ? sf_error_number(error) : "fewer bytes arrived than were written");
    }
    output_.finish();
  }

  /// Gives the finished file its name. Throws `headroom.audio.file.write`.
  void publish() { output_.publish(); }

 private:
  static std::filesystem::path checked(std::filesystem::path path, const AudioFormat& format, std::int64_t frames) {
    require(frames >= 0 && format.channels >= 1 && format.sample_rate >= 1, "headroom.audio.file.options",
            "asked to write ", path, " with ", frames, " frames, ", format.channels, " channels, ", format.sample_rate,
            " Hz, expected at least 0, 1 and 1");
    return path;
  }

  std::uint64_t data_bytes() const {
    return static_cast<std::uint64_t>(frames_) * static_cast<std::uint64_t>(format_.channels) *
           static_cast<std::uint64_t>(bytes_per_sample(format_.encoding));
  }

  std::int64_t write_interleaved(const float* data, std::int64_t n) {
    if (format_.encoding == Encoding::float32) {
      return sf_writef_float(file_.get(), data, n);
    }
    // libsndfile stores the upper bits of an int. Its own conversion from float scales by 2^15 - 1 where reading
    // scales by 2^15, which would change the samples of a file that is read and written.
    const int bits = 8 * bytes_per_sample(format_.encoding);
    const double full_scale = std::ldexp(1.0, bits - 1);
    std::vector<int> values(static_cast<std::size_t>(n * format_.channels));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double scaled = std::nearbyint(full_scale * data[i]);
      const double stored = std::clamp(scaled, -full_scale, full_scale - 1);
      clipped_ += stored != scaled;
      values[i] = static_cast<int>(static_cast<std::int64_t>(stored) * (std::int64_t{1} << (32 - bits)));
    }
    return sf_writef_int(file_.get(), values.data(), n);
  }

  [[noreturn]] void fail_to_write(const std::string& reason) {
    file_.reset();
    output_.fail_to_write(reason + " (" + std::to_string(written_) + " of " + std::to_string(frames_) + " frames)");
  }

  io::AtomicFile output_;
  AudioFormat format_;
  std::int64_t frames_;
  std::int64_t written_ = 0, clipped_ = 0;
  detail::SoundFile file_;
};

/// A recording in memory.
struct Recording {
  torch::Tensor samples;  ///< float [C,T], full scale is 1
  int sample_rate = 0;    ///< Hz
};

/// The whole of a file. Throws those of AudioReader.
inline Recording read_audio(const std::filesystem::path& path) {
  AudioReader reader(path);
  return {reader.read(reader.frames()), reader.sample_rate()};
}

/// Writes `samples` [C,T] as a WAV file, whole or not at all. Throws those of AudioWriter.
inline void write_audio(const std::filesystem::path& path, const torch::Tensor& samples, int sample_rate,
                        Encoding encoding = Encoding::float32) {
  require(samples.dim() == 2, "headroom.audio.file.samples", "got samples ", samples.sizes(), " for ", path,
          ", expected [channels, frames]");
  AudioWriter writer(path, {static_cast<int>(samples.size(0)), sample_rate, encoding}, samples.size(1));
  writer.write(samples);
  writer.close();
}

}  // namespace headroom::inline v0::audio
