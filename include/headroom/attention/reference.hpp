#pragma once

#include <limits>

#include "headroom/attention/scores.hpp"

namespace headroom::inline v0::detail {

/// The definition by ATen operators in q's dtype, scores stored; differentiable by LibTorch itself, any number of
/// times. On any device. The log-sum-exp costs two more tensors of the scores' size, so it is only computed when
/// wanted.
inline AttentionForward reference_attention(torch::Tensor q, torch::Tensor k, torch::Tensor v,
                                            const AttentionRequest& request, bool with_lse) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const ScoreTerms terms(request, q.device());
  const ScoreTile all{0, request.queries(), 0, request.keys()};
  const torch::Tensor hidden = terms.hidden(all);
  // Zero times NaN is NaN: rows that are not finite are taken out, and put back where they may be seen
  torch::Tensor bad_queries, bad_keys;
  if (hidden.defined()) {
    bad_queries = rows_not_finite(q);
    bad_keys = either(rows_not_finite(k), rows_not_finite(v));
    q = without_rows(q, bad_queries);
    k = without_rows(k, bad_keys);
    v = without_rows(v, bad_keys);
  }
  if (request.rotary.defined()) {
    const RotaryRows rows(request);
    q = rotated(q, request.rotary, rows.query.to(q.device()));
    k = rotated(k, request.rotary, rows.key.to(q.device()));
  }
  const auto for_each_query_head = [&](const torch::Tensor& x, int64_t dim) {
    return request.group() == 1 ? x : x.repeat_interleave(request.group(), dim);
  };
  torch::Tensor scores = torch::matmul(q, for_each_query_head(k, -3).transpose(-2, -1)) * request.scale;
  scores = terms.added(terms.capped(scores), all);  // [...,H,Lq,Lk]
  if (bad_queries.defined()) scores = scores.masked_fill(bad_queries.unsqueeze(-1), kInfinity - kInfinity);
  if (bad_keys.defined()) {
    scores = scores.masked_fill(for_each_query_head(bad_keys, -2).unsqueeze(-2), kInfinity - kInfinity);
  }
  if (hidden.defined()) scores = scores.masked_fill(hidden, -kInfinity);
  if (terms.sink.defined()) {
    std::vector<int64_t> column = scores.sizes().vec();
    column.back() = 1;
    const torch::Tensor sink = terms.sink.to(scores.scalar_type()).unsqueeze(-1).unsqueeze(-1).expand(column);
    scores = torch::cat({scores, sink}, -1);
  }
  torch::Tensor dead;  // rows without anything to see: softmax would make NaN of them
  if (scores.size(-1) > 0 && (hidden.defined() || terms.bias.defined())) {
    dead = scores.detach().amax(-1, /*keepdim=*/true) == -kInfinity;
    scores = scores.masked_fill(dead, 0);
  }
  torch::Tensor lse;
  if (with_lse) {
    lse = scores.to(torch::kDouble).logsumexp(-1);  // [...,H,Lq]
    if (dead.defined()) lse = lse.masked_fill(dead.squeeze(-1), -kInfinity);
  }
  torch::Tensor weights = torch::softmax(scores, -1).narrow(-1, 0, request.keys());
  if (dead.defined()) weights = weights.masked_fill(dead, 0);
  if (hidden.defined()) weights = weights.masked_fill(hidden, 0);
  if (request.dropout.active()) {
    weights = (weights * request.dropout.gain()).masked_fill(terms.kept(all).logical_not(), 0);
  }
  return {torch::matmul(weights, for_each_query_head(v, -3)), lse};
}

}  // namespace headroom::inline v0::detail
