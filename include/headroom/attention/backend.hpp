#pragma once

#include <torch/types.h>

#include <array>
#include <vector>

#include "headroom/attention/request.hpp"

// What a backend of attention is: a type with
//   AttentionForward   forward(inputs)
//   AttentionGradients backward(inputs, forward, gradients of its results, wanted)
//   bool               kDifferentiableLse
namespace headroom::inline v0::detail {

/// What attention is computed of; it refers to what the caller holds.
struct AttentionInputs {
  const torch::Tensor &q, &k, &v;
  const AttentionRequest& request;
};

struct AttentionForward {
  torch::Tensor output;                   // [..., H, Lq, Dv]
  torch::Tensor lse;                      // [..., H, Lq], double
  std::vector<torch::Tensor> extra = {};  // what else a backend needs in its backward pass
};

/// Gradients by output and log-sum-exp.
struct ResultGradients {
  torch::Tensor output, lse = {};  // lse may be undefined
};

/// Whether the gradients of q, k, v, bias, relative_bias, alibi_slopes, sink, score_tables and polar_phase
/// are asked for.
using WantedGradients = std::array<bool, 3 + AttentionRequest::kDifferentiable>;

struct AttentionGradients {
  torch::Tensor q, k, v;
  torch::Tensor bias = {}, relative_bias = {}, alibi_slopes = {}, sink = {}, score_tables = {},
                polar_phase = {};  // undefined where not wanted
};

}  // namespace headroom::inline v0::detail
