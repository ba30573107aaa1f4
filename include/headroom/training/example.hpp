#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace headroom::inline v0::training {

/// A mixture and what it is made of: [C,S] and [N,C,S], or a batch of them, [B,C,S] and [B,N,C,S].
struct Example {
  torch::Tensor mixture;
  torch::Tensor stems;
};

/// Where examples come from: source(first, count) gives the examples first, …, first + count - 1 of an endless sequence
/// as a batch. The same indices must give the same examples.
using BatchSource = std::function<Example(int64_t first, int64_t count)>;

/// The examples first, …, first + count - 1 as a batch; `read(index)` gives each as a batch of one.
template <class Read>
Example batch_of(int64_t first, int64_t count, Read&& read) {
  std::vector<torch::Tensor> mixtures, stems;
  for (int64_t index = first; index < first + count; ++index) {
    Example one = read(index);
    mixtures.push_back(std::move(one.mixture));
    stems.push_back(std::move(one.stems));
  }
  return {torch::cat(mixtures), torch::cat(stems)};
}

}  // namespace headroom::inline v0::training
