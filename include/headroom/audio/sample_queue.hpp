#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

namespace headroom::inline v0::audio {

/// Samples [..., n] that were read and wait for the stems that are made of them: what goes in goes out in pieces of
/// other lengths.
class SampleQueue {
 public:
  void push(const torch::Tensor& samples) { blocks_.push_back(samples); }

  /// The next `count` samples of those that were pushed.
  torch::Tensor take(std::int64_t count) {
    std::vector<torch::Tensor> taken;
    for (std::int64_t left = count; left > 0;) {
      torch::Tensor& block = blocks_.front();
      const std::int64_t n = std::min(left, block.size(-1));
      taken.push_back(block.narrow(-1, 0, n));
      block = block.narrow(-1, n, block.size(-1) - n);
      if (block.size(-1) == 0) blocks_.pop_front();
      left -= n;
    }
    return torch::cat(taken, -1);
  }

 private:
  std::deque<torch::Tensor> blocks_;
};

}  // namespace headroom::inline v0::audio
