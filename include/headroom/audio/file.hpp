#pragma once

#include <sndfile.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

namespace detail {

struct CloseSoundFile {
  void operator()(SNDFILE* file) const { sf_close(file); }
};
using SoundFile = std::unique_ptr<SNDFILE, CloseSoundFile>;

inline constexpr std::int64_t kFramesPerBlock = 1 << 16;  ///< bounds the interleaved copies

/// Refuses NaN and infinity in `count` interleaved samples that begin at frame `first_frame`. Looks at the bits, since
/// a program compiled with -ffast-math can't ask isfinite.
inline void require_finite(const float* samples, std::int64_t count, int channels, std::int64_t first_frame,
                           int sample_rate, const std::filesystem::path& path, const char* remedy) {
  for (std::int64_t i = 0; i < count; ++i) {
    constexpr std::uint32_t exponent = 0x7f800000;
    if ((std::bit_cast<std::uint32_t>(samples[i]) & exponent) == exponent) [[unlikely]] {
      const std::int64_t frame = first_frame + i / channels;
      fail("headroom.audio.file.not_finite", path, " has a NaN or infinite sample at frame ", frame, " (",
           static_cast<double>(frame) / sample_rate, " s), channel ", i % channels, ", expected finite samples; ",
           remedy);
    }
  }
}

/// Refuses a WAV file that is shorter than its header says; libsndfile would read what is there in silence. Programs
/// that write to a pipe leave a size of 2 GiB or 4 GiB in the header: that is no promise.
inline void require_whole_wav(const std::filesystem::path& path) {
  std::array<unsigned char, 8> header{};
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(header.data()), header.size());
  if (!file || std::string(header.begin(), header.begin() + 4) != "RIFF") {
    return;
  }
  const std::uint64_t size = 8 + (std::uint64_t{header[4]} | std::uint64_t{header[5]} << 8 |
                                  std::uint64_t{header[6]} << 16 | std::uint64_t{header[7]} << 24);
  const std::uint64_t present = std::filesystem::file_size(path);
  require(size <= present || size >= 0x7ffff000, "headroom.audio.file.truncated", path, " has ", present,
          " bytes, its header says ", size, "; copy or download it again");
}

inline std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : ".";
}

/// Refuses to begin writing `bytes` into the folder of `path` when there is less room.
inline void require_room(const std::filesystem::path& path, std::uint64_t bytes) {
  std::error_code no_answer;
  const auto space = std::filesystem::space(folder_of(path), no_answer);
  require(no_answer || space.available >= bytes, "headroom.audio.file.full", path, " needs ", bytes, " bytes, ",
          folder_of(path), " has room for ", space.available, "; free some room or choose another folder");
}

}  // namespace detail

/// Reads an audio file piece by piece: WAV, FLAC, AIFF, Ogg and whatever else libsndfile knows.
class AudioReader {
 public:
  /// Opens `path`. Throws `headroom.audio.file.missing`, `file.empty` (no bytes or no samples), `file.format` (not
  /// audio), `file.truncated` (shorter than its header says).
  explicit AudioReader(std::filesystem::path path) : path_(std::move(path)) {
    require(std::filesystem::is_regular_file(path_), "headroom.audio.file.missing", "no file ", path_,
            "; check the spelling and the folder");
    require(std::filesystem::file_size(path_) > 0, "headroom.audio.file.empty", path_,
            " has 0 bytes, expected audio; copy or download it again");
    file_.reset(sf_open(path_.string().c_str(), SFM_READ, &info_));
    require(file_ != nullptr, "headroom.audio.file.format", path_, " can't be read as audio: ", sf_strerror(nullptr),
            " Expected WAV, FLAC, AIFF or Ogg; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    require(info_.frames != SF_COUNT_MAX, "headroom.audio.file.format", path_,
            " does not say how long it is; convert it, e.g. ffmpeg -i INPUT OUTPUT.wav");
    detail::require_whole_wav(path_);
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
  std::filesystem::path path_;
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

/// Writes a WAV file of known length piece by piece; beyond 4 GiB it is RF64. The samples go to a hidden temporary
/// file in the same folder, which `close()` renames, so that `path` is either what it was or the whole new file.
/// On an error, or without `close()`, the temporary file is removed.
class AudioWriter {
 public:
  /// `frames`: how many will be written. Throws `headroom.audio.file.options`, `headroom.audio.file.full` (the disk
  /// has less room than the file needs), `headroom.audio.file.write` (no such folder, no permission).
  AudioWriter(std::filesystem::path path, const AudioFormat& format, std::int64_t frames)
      : path_(std::move(path)), format_(format), frames_(frames) {
    require(frames >= 0 && format.channels >= 1 && format.sample_rate >= 1, "headroom.audio.file.options",
            "asked to write ", path_, " with ", frames, " frames, ", format.channels, " channels, ", format.sample_rate,
            " Hz, expected at least 0, 1 and 1");
    const std::filesystem::path folder = detail::folder_of(path_);
    require(std::filesystem::is_directory(folder), "headroom.audio.file.write", "can't write ", path_,
            ": there is no folder ", folder, "; create it first");
    detail::require_room(path_, data_bytes());
    static std::atomic<unsigned> count{std::random_device{}()};
    std::ostringstream name;
    name << '.' << path_.filename().string() << '.' << count++ << ".tmp";
    temporary_ = folder / name.str();
    constexpr std::uint64_t wav_limit = 0xffffffff - 4096;  // sizes have 32 bits; the rest is room for the header
    SF_INFO info{};
    info.channels = format.channels;
    info.samplerate = format.sample_rate;
    info.format = (data_bytes() > wav_limit ? SF_FORMAT_RF64 : SF_FORMAT_WAV) |
                  (format.encoding == Encoding::pcm16   ? SF_FORMAT_PCM_16
                   : format.encoding == Encoding::pcm24 ? SF_FORMAT_PCM_24
                                                        : SF_FORMAT_FLOAT);
    file_.reset(sf_open(temporary_.string().c_str(), SFM_WRITE, &info));
    if (file_ == nullptr) {
      fail_to_write(sf_strerror(nullptr));
    }
    // The PEAK chunk holds the time of day: without it equal samples make equal files.
    sf_command(file_.get(), SFC_SET_ADD_PEAK_CHUNK, nullptr, SF_FALSE);
  }

  AudioWriter(AudioWriter&&) = default;
  AudioWriter& operator=(AudioWriter&&) = delete;
  ~AudioWriter() {
    if (file_ != nullptr) {
      discard();
    }
  }

  const std::filesystem::path& path() const { return path_; }
  std::int64_t written() const { return written_; }  ///< frames so far
  std::int64_t clipped() const { return clipped_; }  ///< samples so far that the integer encoding had to clip

  /// Appends `samples` [C,n], full scale is 1, of any floating dtype and device. Throws `headroom.audio.file.samples`
  /// (shape, dtype, or after the end), `headroom.audio.file.not_finite`, `headroom.audio.file.write`.
  void write(const torch::Tensor& samples) {
    require(samples.dim() == 2 && samples.size(0) == format_.channels && samples.is_floating_point(),
            "headroom.audio.file.samples", "got samples ", samples.sizes(), " of ", samples.dtype().name(), " for ",
            path_, ", expected floating point [", format_.channels, ", n]");
    require(
        file_ != nullptr && written_ + samples.size(1) <= frames_, "headroom.audio.file.samples", "got ",
        samples.size(1), " more frames for ", path_, " after ", written_, " of ", frames_,
        file_ ? "; open the writer with the number of frames that will come" : "; the writer is closed, open another");
    for (std::int64_t done = 0; done < samples.size(1); done += detail::kFramesPerBlock) {
      const std::int64_t n = std::min(samples.size(1) - done, detail::kFramesPerBlock);
      const torch::Tensor block =
          samples.detach().narrow(1, done, n).t().to(torch::kCPU, torch::kFloat).contiguous();  // [n,C]
      const float* data = block.data_ptr<float>();
      detail::require_finite(data, block.numel(), format_.channels, written_, format_.sample_rate, path_,
                             "the file was not written: look for the source of the values, e.g. a diverged model");
      if (write_interleaved(data, n) != n) {
        fail_to_write(sf_strerror(file_.get()));
      }
      written_ += n;
    }
  }

  /// Finishes the file and puts it in place, replacing what was there. Throws `headroom.audio.file.incomplete` (fewer
  /// frames than promised), `headroom.audio.file.write`.
  void close() {
    require(file_ != nullptr, "headroom.audio.file.samples", path_, " is closed already");
    if (written_ != frames_) {
      discard();
      fail("headroom.audio.file.incomplete", "got ", written_, " frames for ", path_, ", expected ", frames_,
           "; the file was not written");
    }
    sf_write_sync(file_.get());
    const int error = sf_close(file_.release());
    std::error_code failure;
    const std::uintmax_t size = std::filesystem::file_size(temporary_, failure);
    if (error != 0 || failure || size < data_bytes()) {
      fail_to_write(error != 0 ? sf_error_number(error) : "fewer bytes arrived than were written");
    }
    std::filesystem::rename(temporary_, path_, failure);
    if (failure) {
      fail_to_write(failure.message());
    }
  }

 private:
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

  void discard() noexcept {
    file_.reset();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
  }

  [[noreturn]] void fail_to_write(const std::string& reason) {
    discard();
    fail("headroom.audio.file.write", "can't write ", path_, ": ", reason, " (", written_, " of ", frames_,
         " frames); check the room on the disk and the permissions, or choose another folder. What was there before "
         "is untouched");
  }

  std::filesystem::path path_, temporary_;
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
