#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headroom/core/error.hpp"

#if __has_include(<rubberband/RubberBandStretcher.h>)
#define HEADROOM_HAS_RUBBERBAND
#include <rubberband/RubberBandStretcher.h>
#endif

namespace headroom::inline v0::training {

/// How sound is changed in tempo and pitch.
struct Stretch {
  double tempo = 1;      ///< 2: twice as fast
  double semitones = 0;  ///< 12: an octave higher

  bool changes() const { return tempo != 1 || semitones != 0; }
};

/// Whether librubberband was there when the program was compiled.
inline constexpr bool kHasRubberband =
#ifdef HEADROOM_HAS_RUBBERBAND
    true;
#else
    false;
#endif

/// Throws headroom.training.augmentation.rubberband where it was not.
inline void require_rubberband() {
  require(kHasRubberband, "headroom.training.augmentation.rubberband",
          "this program was built without librubberband, which changes pitch and tempo; install it (Debian: "
          "librubberband-dev) and configure the build again, or set data.pitch and data.tempo to 0");
}

/// `length` samples of [C,n] with another tempo and pitch, by librubberband's finer engine: float [C,length]. What `n`
/// samples at the tempo do not fill is silent. Throws headroom.training.augmentation.rubberband.
inline torch::Tensor stretched(const torch::Tensor& samples, const Stretch& stretch, std::int64_t length,
                               std::int64_t sample_rate) {
  require_rubberband();
  const std::int64_t channels = samples.size(0), frames = samples.size(1);
  torch::Tensor result = torch::zeros({channels, length});  // [C,length]
#ifdef HEADROOM_HAS_RUBBERBAND
  using RubberBand::RubberBandStretcher;
  constexpr std::int64_t kBlock = 4096;
  RubberBandStretcher engine(static_cast<std::size_t>(sample_rate), static_cast<std::size_t>(channels),
                             RubberBandStretcher::OptionEngineFiner | RubberBandStretcher::OptionThreadingNever |
                                 RubberBandStretcher::OptionChannelsTogether,
                             1 / stretch.tempo, std::exp2(stretch.semitones / 12));
  engine.setExpectedInputDuration(static_cast<std::size_t>(frames));
  engine.setMaxProcessSize(kBlock);
  const torch::Tensor input = samples.to(torch::kFloat).contiguous();
  const auto rows = [&](float* data, std::int64_t row, std::int64_t column) {
    std::vector<float*> pointers;
    for (std::int64_t c = 0; c < channels; ++c) pointers.push_back(data + c * row + column);
    return pointers;
  };
  engine.study(rows(input.data_ptr<float>(), frames, 0).data(), static_cast<std::size_t>(frames), true);
  for (std::int64_t done = 0, made = 0; done < frames; done += kBlock) {
    const std::int64_t count = std::min(kBlock, frames - done);
    engine.process(rows(input.data_ptr<float>(), frames, done).data(), static_cast<std::size_t>(count),
                   done + count == frames);
    while (made < length && engine.available() > 0) {
      const auto ready = static_cast<std::size_t>(std::min<std::int64_t>(engine.available(), length - made));
      made += static_cast<std::int64_t>(engine.retrieve(rows(result.data_ptr<float>(), length, made).data(), ready));
    }
  }
#else
  static_cast<void>(stretch);
  static_cast<void>(sample_rate);
  static_cast<void>(frames);
#endif
  return result;
}

}  // namespace headroom::inline v0::training
