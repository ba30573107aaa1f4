#pragma once

#include <torch/types.h>

#include <cstdint>

namespace headroom::inline v0::audio {

/// Samples [F,n] with another number of channels: the mean of all, or one channel as many.
inline torch::Tensor with_channels(const torch::Tensor& samples, std::int64_t channels) {
  if (samples.size(0) == channels) return samples;
  return channels == 1 ? samples.mean(0, /*keepdim=*/true) : samples.expand({channels, samples.size(1)});
}

}  // namespace headroom::inline v0::audio
