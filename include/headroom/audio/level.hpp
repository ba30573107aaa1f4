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

/// Reads a recording from its beginning to its end and goes back to the beginning. Silence has the deviation 1. Throws
/// `headroom.audio.file.*`.
inline Level level_of(AudioReader& recording) {
  constexpr std::int64_t kFrames = 1 << 16;
  double sum = 0, squares = 0;
  recording.seek(0);
  while (recording.position() < recording.frames()) {
    const torch::Tensor mono = recording.read(kFrames).to(torch::kDouble).mean(0);  // [n]
    sum += mono.sum().item<double>();
    squares += mono.square().sum().item<double>();
  }
  recording.seek(0);
  const auto frames = static_cast<double>(recording.frames());
  const double mean = sum / frames, variance = std::max(squares / frames - mean * mean, 0.0);
  return {mean, variance > 0 ? std::sqrt(variance) : 1};
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
