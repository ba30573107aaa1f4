#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cmath>

namespace headroom::inline v0::audio {

/// How loud a recording is: mean and standard deviation over all samples of the mean of its channels. A model for
/// recordings with mean 0 and deviation 1 is told by it, see SeparatorOptions::level.
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

}  // namespace headroom::inline v0::audio
