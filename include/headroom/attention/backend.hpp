#pragma once

#include <torch/types.h>

#include <vector>

// What the backends of attention have in common.
namespace headroom::inline v0::detail {

struct AttentionForward {
  torch::Tensor output;                   // [..., H, Lq, Dv]
  torch::Tensor lse;                      // [..., H, Lq], double
  std::vector<torch::Tensor> extra = {};  // what else a backend needs in its backward pass
};

struct AttentionGradients {
  torch::Tensor q, k, v;
  torch::Tensor bias = {}, relative_bias = {}, alibi_slopes = {}, sink = {};  // undefined where not wanted
};

}  // namespace headroom::inline v0::detail
