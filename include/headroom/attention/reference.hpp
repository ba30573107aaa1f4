#pragma once

#include <limits>

#include "headroom/attention/request.hpp"

namespace headroom::inline v0::detail {

/// softmax(scale·q·kᵀ)·v by ATen operators, scores stored; differentiable by LibTorch itself. On any device. The
/// log-sum-exp costs two more tensors of the scores' size, so it is only computed when wanted.
inline AttentionForward reference_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                            const AttentionRequest& request, bool with_lse) {
  torch::Tensor scores = torch::matmul(q, k.transpose(-2, -1)) * request.scale;  // [...,H,Lq,Lk]
  torch::Tensor hidden;                                                          // true where a key must not be seen
  const int64_t queries = q.size(-2), keys = k.size(-2);
  if (request.causal) hidden = torch::ones({queries, keys}, q.options().dtype(torch::kBool)).triu(1);
  if (request.key_lengths.defined()) {
    const torch::Tensor past_end = torch::arange(keys, q.options().dtype(torch::kLong)) >=
                                   request.key_lengths.to(q.device()).unsqueeze(-1).unsqueeze(-1).unsqueeze(-1);
    hidden = hidden.defined() ? hidden | past_end : past_end;
  }
  if (hidden.defined()) scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const torch::Tensor lse =
      with_lse ? scores.detach().to(torch::kDouble).logsumexp(-1) : torch::Tensor();  // [...,H,Lq]
  torch::Tensor weights = torch::softmax(scores, -1);
  if (hidden.defined()) weights = weights.masked_fill(hidden, 0);  // a row without keys is NaN after softmax
  return {torch::matmul(weights, v), lse};
}

}  // namespace headroom::inline v0::detail
