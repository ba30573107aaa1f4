#pragma once

#include <torch/types.h>

#include <limits>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0 {

/// Output of attention and, for each query, the natural logarithm of the sum of exponentials of its scores.
struct AttentionResult {
  torch::Tensor output;  ///< [..., H, Lq, Dv]
  torch::Tensor lse;     ///< [..., H, Lq]
};

/// Attention over all keys from results over disjoint parts of the keys, so that keys can be streamed or distributed:
/// outputs weighted by exp(lse). Differentiable, also through the log-sum-exps; computed in float, in double for
/// double. A query without keys in any part gets 0 and -inf. A sink belongs to one part only. Throws
/// headroom.attention.merge.
inline AttentionResult merge_attention(const std::vector<AttentionResult>& parts) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  require(!parts.empty(), "headroom.attention.merge", "there are no parts to merge; give at least one");
  std::vector<torch::Tensor> lses;
  for (const auto& [output, lse] : parts) {
    require(output.defined() && lse.defined() && output.is_floating_point() && lse.is_floating_point(),
            "headroom.attention.merge",
            "a part lacks its output or its log-sum-exp; expected results of attention_with_lse");
    require(output.sizes() == parts[0].output.sizes() && output.dtype() == parts[0].output.dtype() &&
                output.device() == parts[0].output.device() && lse.device() == output.device() && output.dim() > 0 &&
                lse.sizes() == output.sizes().slice(0, output.dim() - 1),
            "headroom.attention.merge", "a part has the output ", output.dtype(), " ", output.sizes(), " on ",
            output.device(), " and the log-sum-exp ", lse.sizes(), " on ", lse.device(),
            ", the first one has the output ", parts[0].output.dtype(), " ", parts[0].output.sizes(), " on ",
            parts[0].output.device(),
            "; expected outputs [...,H,Lq,Dv] of one shape, dtype and device with log-sum-exps [...,H,Lq]");
    lses.push_back(lse);
  }
  const auto dtype = parts[0].output.scalar_type();
  const auto computed_in = dtype == torch::kDouble ? torch::kDouble : torch::kFloat;
  torch::Tensor highest = lses[0].detach();
  for (const torch::Tensor& lse : lses) highest = torch::maximum(highest, lse.detach());
  highest = highest.masked_fill(highest == -kInfinity, 0);
  torch::Tensor sum, output;
  for (size_t i = 0; i < parts.size(); ++i) {
    const torch::Tensor weight = (lses[i] - highest).exp();
    const torch::Tensor weighted = parts[i].output.to(computed_in) * weight.to(computed_in).unsqueeze(-1);
    sum = i == 0 ? weight : sum + weight;
    output = i == 0 ? weighted : output + weighted;
  }
  const torch::Tensor dead = sum == 0;  // no keys in any part
  sum = sum.masked_fill(dead, 1);
  return {(output / sum.to(computed_in).unsqueeze(-1)).to(dtype),
          (sum.log() + highest).masked_fill(dead, -kInfinity).to(computed_in)};
}

}  // namespace headroom::inline v0
