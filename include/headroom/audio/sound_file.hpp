#pragma once

#include <sndfile.h>

#include <cstdint>
#include <filesystem>
#include <memory>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"

namespace headroom::inline v0::audio::detail {

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

}  // namespace headroom::inline v0::audio::detail
