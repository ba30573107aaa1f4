#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "headroom/audio/reader.hpp"
#include "headroom/audio/segment_model.hpp"

namespace headroom::inline v0::audio {

/// How loud a recording is: mean and standard deviation over all samples of the mean of its channels.
struct Level {
  double mean = 0, deviation = 1;
};

/// Finds the level of a recording, piece by piece.
class LevelSum {
 public:
  void add(const torch::Tensor& samples) {                          // [C,n]
    const torch::Tensor mono = samples.to(torch::kDouble).mean(0);  // [n]
    sum_ += mono.sum().item<double>();
    squares_ += mono.square().sum().item<double>();
    frames_ += static_cast<double>(mono.numel());
  }
  /// Of all that was added; silence has the deviation 1.
  Level level() const {
    const double mean = sum_ / frames_, variance = std::max(squares_ / frames_ - mean * mean, 0.0);
    return {mean, variance > 0 ? std::sqrt(variance) : 1};
  }

 private:
  double sum_ = 0, squares_ = 0, frames_ = 0;
};

/// Reads a recording from its beginning to its end and goes back to the beginning. Throws
/// `headroom.audio.file.*`.
inline Level level_of(AudioReader& recording) {
  constexpr std::int64_t kFrames = 1 << 16;
  LevelSum sum;
  recording.seek(0);
  while (recording.position() < recording.frames()) sum.add(recording.read(kFrames));
  recording.seek(0);
  return sum.level();
}

/// A model for recordings of `level`, made of one for recordings with mean 0 and deviation 1: what
/// Music-Source-Separation-Training does with `inference.normalize`, (x - mean) / deviation before the model, and after
/// it each stem times the deviation plus the mean. It is done segment by segment; since they are blended with weights
/// that add up to 1, the result is that of the whole recording, but for silence behind its end, which is not lifted
/// here.
inline SegmentModel at_level(SegmentModel model, const Level& level) {
  return [model = std::move(model), level](const torch::Tensor& segments) {
    return model((segments - level.mean) / level.deviation).mul(level.deviation).add_(level.mean);
  };
}

}  // namespace headroom::inline v0::audio
