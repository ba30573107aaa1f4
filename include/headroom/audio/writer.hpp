#pragma once

#include <sndfile.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "headroom/audio/format.hpp"
#include "headroom/audio/sound_file.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/file_name.hpp"

namespace headroom::inline v0::audio {

namespace detail {

/// Refuses to begin writing `bytes` into the folder of `path` when there is less room.
inline void require_room(const std::filesystem::path& path, std::uint64_t bytes) {
  std::error_code no_answer;
  const auto space = std::filesystem::space(io::folder_of(path), no_answer);
  require(no_answer || space.available >= bytes, "headroom.audio.file.full", path, " needs ", bytes, " bytes, ",
          io::folder_of(path), " has room for ", space.available, "; free some room or choose another folder");
}

/// What `frames` take on the disk at least. How well FLAC compresses nobody knows before.
inline std::uint64_t least_bytes(const AudioFormat& format, std::int64_t frames) {
  return is_flac(format.encoding) ? 0 : sample_bytes(format, frames);
}

/// A descriptor that libsndfile writes to. The first error of the system is kept: libsndfile says nothing of those that
/// come while it closes a FLAC file.
struct SoundOutput {
  int descriptor;
  int error = 0;

  static SoundOutput& of(void* user) { return *static_cast<SoundOutput*>(user); }

  /// The output has to outlive the file.
  SNDFILE* open(SF_INFO& info) {
    SF_VIRTUAL_IO calls{};
    calls.get_filelen = [](void* user) -> sf_count_t {
      struct stat status {};
      return ::fstat(of(user).descriptor, &status) == 0 ? status.st_size : -1;
    };
    calls.seek = [](sf_count_t offset, int whence, void* user) -> sf_count_t {
      return ::lseek(of(user).descriptor, offset, whence);
    };
    calls.tell = [](void* user) -> sf_count_t { return ::lseek(of(user).descriptor, 0, SEEK_CUR); };
    calls.read = [](void* bytes, sf_count_t count, void* user) -> sf_count_t {
      return ::read(of(user).descriptor, bytes, static_cast<std::size_t>(count));
    };
    calls.write = [](const void* bytes, sf_count_t count, void* user) -> sf_count_t {
      auto& [descriptor, error] = of(user);
      if (error == 0) {
        error = io::detail::write_all(descriptor, {static_cast<const char*>(bytes), static_cast<std::size_t>(count)});
      }
      return error == 0 ? count : 0;
    };
    return sf_open_virtual(&calls, SFM_WRITE, &info, this);
  }
};

}  // namespace detail

/// Writes a WAV or FLAC file of known length piece by piece; beyond 4 GiB it is RF64. The samples go to an
/// io::AtomicFile, which `close()` gives its name, so that `path` is either what it was or the whole new file. On an
/// error, or without `close()`, nothing is left of it.
class AudioWriter {
 public:
  /// `frames`: how many will be written. Throws `headroom.audio.file.options`, `headroom.audio.file.full` (the disk
  /// has less room than the file needs), `headroom.audio.file.write` (no such folder, no permission, a folder in its
  /// place).
  AudioWriter(std::filesystem::path path, const AudioFormat& format, std::int64_t frames)
      : output_(checked(std::move(path), format, frames), "headroom.audio.file.write"),
        format_(format),
        frames_(frames),
        bytes_(std::make_unique<detail::SoundOutput>(output_.descriptor())) {
    detail::require_room(output_.path(), detail::least_bytes(format, frames));
    SF_INFO info = detail::sound_file_info(format, frames);
    file_.reset(bytes_->open(info));
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
    if (error != 0 || bytes_->error != 0) {
      fail_to_write(sf_error_number(error));
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
    const SF_INFO info = detail::sound_file_info(format, frames);
    require(sf_format_check(&info) != 0, "headroom.audio.file.options", "asked to write ", path, " with ",
            format.channels, " channels, expected at most ",
            is_flac(format.encoding) ? "8 in FLAC; WAV takes more" : "1024");
    return path;
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
    output_.fail_to_write((bytes_->error != 0 ? std::strerror(bytes_->error) : reason) + " (" +
                          std::to_string(written_) + " of " + std::to_string(frames_) + " frames)");
  }

  io::AtomicFile output_;
  AudioFormat format_;
  std::int64_t frames_;
  std::int64_t written_ = 0, clipped_ = 0;
  std::unique_ptr<detail::SoundOutput> bytes_;  // where it is when this object moves
  detail::SoundFile file_;
};

}  // namespace headroom::inline v0::audio
