#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>

namespace headroom::inline v0::training {

/// A mixture and what it is made of: [C,S] and [N,C,S], or a batch of them, [B,C,S] and [B,N,C,S].
struct Example {
  torch::Tensor mixture;
  torch::Tensor stems;
};

/// Where examples come from: source(first, count) gives the examples first, …, first + count - 1 of an endless sequence
/// as a batch. The same indices must give the same examples.
using BatchSource = std::function<Example(int64_t first, int64_t count)>;

}  // namespace headroom::inline v0::training
