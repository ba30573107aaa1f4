#pragma once

#include <torch/types.h>

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "headroom/attention/heads.hpp"

namespace headroom::inline v0::detail {

/// A softmax over scores that come chunk by chunk (Milakov & Gimelshein 2018).
struct RunningSoftmax {
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  torch::Tensor maximum, sum;  // [b,h,queries,1]; the sum is of exp(score - maximum)

  /// For scores [b,h,queries,*]. A sink [h] is a score that is already there; it may be undefined.
  RunningSoftmax(const std::vector<int64_t>& rows, const torch::Tensor& sink, const torch::TensorOptions& options) {
    std::vector<int64_t> sizes = rows;
    sizes.push_back(1);
    if (sink.defined()) {
      maximum = sink.to(options.dtype()).unsqueeze(-1).unsqueeze(-1).expand(sizes);
      sum = (maximum != -kInfinity).to(options.dtype());
    } else {
      maximum = torch::full(sizes, -kInfinity, options), sum = torch::zeros(sizes, options);
    }
  }
  /// Turns the scores of a chunk into exp(score - maximum), in place, and returns the factor by which what belongs to
  /// chunks before shrinks, since the maximum rose. Scores that are `hidden` count as -inf.
  torch::Tensor add(torch::Tensor& scores, const torch::Tensor& hidden) {
    if (hidden.defined()) scores.masked_fill_(hidden, -kInfinity);
    const torch::Tensor higher = torch::maximum(maximum, scores.amax(-1, /*keepdim=*/true));
    const torch::Tensor shift = higher.masked_fill(higher == -kInfinity, 0);
    const torch::Tensor shrink = (maximum - shift).exp_();
    sum = sum * shrink + scores.sub_(shift).exp_().sum(-1, /*keepdim=*/true);
    maximum = higher;
    return shrink;
  }
};

/// True if some log-sum-exps are so large that even in double they have lost the logarithm of the sum.
inline bool is_coarse_lse(const torch::Tensor& lse) {
  static constexpr double kCoarse = 1 << 23;  // from here on, errors of weights may be above 2^-30
  if (lse.is_meta() || lse.numel() == 0) return false;
  return lse.masked_fill(lse == -RunningSoftmax::kInfinity, 0).abs().gt(kCoarse).any().item<bool>();
}

/// The log-sum-exp in two parts that the dtype of computation holds exactly; 0 for a query without keys.
struct SplitLse {
  torch::Tensor high, low;  // [...,H,Lq]
  bool coarse = false;

  SplitLse(torch::Tensor high, torch::Tensor low, bool coarse)
      : high(std::move(high)), low(std::move(low)), coarse(coarse) {}
  SplitLse(const torch::Tensor& lse, torch::ScalarType dtype) {
    const torch::Tensor whole = lse.masked_fill(lse == -RunningSoftmax::kInfinity, 0);
    high = whole.to(dtype);
    low = (whole - high).to(dtype);
    coarse = is_coarse_lse(whole);
  }
  SplitLse of(const HeadRange& heads) const { return {part_of(high, heads, 1), part_of(low, heads, 1), coarse}; }
};

}  // namespace headroom::inline v0::detail
