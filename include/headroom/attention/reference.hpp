#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "headroom/attention/backend.hpp"
#include "headroom/attention/polar.hpp"
#include "headroom/attention/rotation.hpp"
#include "headroom/attention/scores.hpp"

namespace headroom::inline v0::detail {

/// weights·v of which `hidden` weights are 0, for gradients that are not finite: 0·NaN would bring those of a query to
/// values that it does not see. Differentiable any number of times.
struct SeenValues : torch::autograd::Function<SeenValues> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& weights,
                               const torch::Tensor& v, const torch::Tensor& hidden) {
    ctx->save_for_backward({weights, v, hidden});
    return torch::matmul(weights, v);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    const auto saved = ctx->get_saved_variables();
    torch::Tensor weights = saved[0], grad_weights, grad_v;
    const torch::Tensor &v = saved[1], &hidden = saved[2], bad = rows_not_finite(grad[0]);
    if (ctx->needs_input_grad(0)) grad_weights = torch::matmul(grad[0], v.transpose(-2, -1));
    if (bad.defined()) {
      weights = weights.masked_fill(bad.unsqueeze(-1).logical_and(hidden.logical_not()),
                                    std::numeric_limits<double>::quiet_NaN());
    }
    if (ctx->needs_input_grad(1)) {
      grad_v = torch::matmul(weights.transpose(-2, -1), without_rows(grad[0], bad)).sum_to_size(v.sizes());
    }
    return {grad_weights, grad_v, {}};
  }
};

/// Of scores [..., H, Lq, Lk] in double, -inf in `dead` rows [..., H, Lq, 1] and without keys. LibTorch's logsumexp
/// has a gradient of exp(score - result), which does not sum to 1 once the result has lost the logarithm of the sum.
inline torch::Tensor log_sum_exp(const torch::Tensor& scores, const torch::Tensor& dead) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (scores.size(-1) == 0) return scores.sum(-1).to(torch::kDouble) - kInfinity;
  const torch::Tensor highest = scores.detach().amax(-1, /*keepdim=*/true).to(torch::kDouble);
  const torch::Tensor lse = ((scores.to(torch::kDouble) - highest).exp().sum(-1).log() + highest.squeeze(-1));
  return dead.defined() ? lse.masked_fill(dead.squeeze(-1), -kInfinity) : lse;
}

/// The definition by ATen operators in `dtype`, scores stored; differentiable by LibTorch itself, any number of times.
/// On any device. The log-sum-exp costs two more tensors of the scores' size, so it is only computed when wanted.
inline AttentionForward reference_attention(const AttentionInputs& in, bool with_lse, torch::ScalarType dtype) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
  const AttentionRequest& request = in.request;
  torch::Tensor q = in.q.to(dtype), k = in.k.to(dtype), v = in.v.to(dtype);
  const ScoreTerms terms(request, q.device());
  const ScoreChunk all{0, request.queries(), 0, request.keys()};
  const torch::Tensor hidden = terms.hidden(all);
  // Zero times NaN is NaN: rows that are not finite are taken out, and put back where they may be seen
  torch::Tensor bad_queries, bad_keys;
  if (hidden.defined() || c10::multiply_integers(request.score_sizes) == 0) {
    bad_queries = rows_not_finite(q);
    bad_keys = either(rows_not_finite(k), rows_not_finite(v));
    q = without_rows(q, bad_queries);
    k = without_rows(k, bad_keys);
    v = without_rows(v, bad_keys);
  }
  if (request.rotary.defined()) {
    const TableRows rows(request);
    q = rotated(q, request.rotary, rows.query.to(q.device()));
    k = rotated(k, request.rotary, rows.key.to(q.device()));
  }
  if (request.polar.defined()) {
    const RequestTurns turns(request, q);
    q = polar_pairs(q, turns.q), k = polar_pairs(k, turns.k);
  }
  const auto for_each_query_head = [&](const torch::Tensor& x, int64_t dim) {
    const int64_t shared = request.heads_per_kv_head();
    return shared == 1 ? x : x.repeat_interleave(shared, dim);
  };
  torch::Tensor scores = torch::matmul(q, for_each_query_head(k, -3).transpose(-2, -1)) * request.scale;
  scores = terms.added(terms.capped(scores), all);  // [...,H,Lq,Lk]
  if (bad_queries.defined()) scores = scores.masked_fill(bad_queries.unsqueeze(-1), kNaN);
  if (bad_keys.defined()) {
    scores = scores.masked_fill(for_each_query_head(bad_keys, -2).unsqueeze(-2), kNaN);
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
  const torch::Tensor lse = with_lse ? log_sum_exp(scores, dead) : torch::Tensor();
  torch::Tensor weights = torch::softmax(scores, -1).narrow(-1, 0, request.keys());
  if (dead.defined()) weights = weights.masked_fill(dead, 0);
  if (hidden.defined()) weights = weights.masked_fill(hidden, 0);
  if (request.dropout.active()) {
    weights = (weights * request.dropout.gain()).masked_fill(terms.kept(all).logical_not(), 0);
  }
  const torch::Tensor values = for_each_query_head(v, -3);
  return {hidden.defined() ? SeenValues::apply(weights, values, hidden) : torch::matmul(weights, values), lse};
}

}  // namespace headroom::inline v0::detail
