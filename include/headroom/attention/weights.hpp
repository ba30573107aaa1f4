#pragma once

#include "headroom/attention/attention.hpp"

namespace headroom::inline v0 {

namespace detail {

/// The weights before dropout [..., H, Lq, Lk], or their mean over the heads [..., 1, Lq, Lk], chunk by chunk.
class ChunkedWeights {
 public:
  explicit ChunkedWeights(const AttentionInputs& in) : in_(in), scores_(in, std::nullopt) {}

  torch::Tensor forward(const torch::Tensor& whole_lse, bool mean_over_heads) const {
    std::vector<int64_t> shape = in_.request.score_sizes;
    if (mean_over_heads) shape.end()[-3] = 1;
    const torch::Tensor all = torch::zeros(shape, in_.q.options().dtype(scores_.dtype()));
    const SplitLse lse(whole_lse, scores_.dtype());
    scores_.for_each_head_range([&](const HeadInputs& inputs, const HeadRange& heads, const HeadRange&) {
      const SplitLse rows = lse.of(heads);
      const torch::Tensor target = part_of(all, heads, 2);
      scores_.for_each_query_chunk([&](int64_t first, int64_t last) {
        const torch::Tensor q = scores_.queries(inputs, first, last);
        scores_.sharpen(rows, inputs, q, {first, last});
        scores_.for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
          Scores s = scores_.scores(inputs, q, scores_.keys(inputs, chunk), chunk);
          const torch::Tensor part = ScoreTerms::narrow_scores(target, chunk);
          part.add_(ChunkedScores::take_weights(s, rows, chunk).sum_to_size(part.sizes()));
        });
      });
    });
    return mean_over_heads ? all.div_(std::max<int64_t>(in_.request.heads(), 1)) : all;
  }

  /// Gradients of all but v by that of what forward() gives.
  AttentionGradients backward(const torch::Tensor& grad_weights, const torch::Tensor& whole_lse,
                              WantedGradients wanted) const {
    wanted[2] = false;
    ScoreGradients gradients(in_, scores_, wanted);
    const int64_t heads = in_.request.heads();
    const double share = grad_weights.size(-3) < heads ? 1.0 / static_cast<double>(heads) : 1.0;
    const SplitLse lse(whole_lse, scores_.dtype());
    const torch::Tensor delta = torch::empty(whole_lse.sizes(), whole_lse.options().dtype(scores_.dtype()));
    scores_.for_each_head_range([&](const HeadInputs& inputs, const HeadRange& heads, const HeadRange& of_kv) {
      const Rows rows{part_of(grad_weights, heads, 2),
                      part_of(delta, heads, 1),
                      lse.of(heads),
                      gradients.part(heads, of_kv),
                      gradients,
                      share};
      scores_.for_each_query_chunk([&](int64_t first, int64_t last) { backward_queries(inputs, first, last, rows); });
    });
    gradients.add_sink(delta, lse);
    return gradients.take();
  }

 private:
  /// What the backward pass knows of the queries of some heads, and where their gradients go.
  struct Rows {
    torch::Tensor grad_weights, delta;
    SplitLse lse;
    AttentionGradients sums;
    const ScoreGradients& gradients;
    double share;  ///< of a head in the gradient of a weight
  };

  void backward_queries(const HeadInputs& inputs, int64_t first, int64_t last, const Rows& rows) const {
    const torch::Tensor q = scores_.queries(inputs, first, last);
    scores_.sharpen(rows.lse, inputs, q, {first, last});
    const auto grad_of = [&](const ScoreChunk& chunk) {
      return ScoreTerms::narrow_scores(rows.grad_weights, chunk).to(scores_.dtype()) * rows.share;
    };
    // The gradient of a score, P·(dP - sum of P·dP over the row), needs the whole row first
    const torch::Tensor sums = rows.delta.slice(2, first, last).zero_();
    scores_.for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
      Scores s = scores_.scores(inputs, q, scores_.keys(inputs, chunk), chunk);
      torch::Tensor products = ChunkedScores::take_weights(s, rows.lse, chunk) * grad_of(chunk);
      if (s.hidden.defined()) products.masked_fill_(s.hidden, 0);  // where the gradient is not finite
      sums.add_(products.sum(-1));
    });
    torch::Tensor grad_q;
    if (rows.sums.q.defined()) grad_q = torch::zeros_like(q);
    scores_.for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
      const torch::Tensor k = scores_.keys(inputs, chunk);
      Scores s = scores_.scores(inputs, q, k, chunk);
      const torch::Tensor weights = ChunkedScores::take_weights(s, rows.lse, chunk);
      rows.gradients.add({inputs, chunk, s, q, k, rows.sums}, (grad_of(chunk) - sums.unsqueeze(-1)).mul_(weights),
                         grad_q);
    });
    rows.gradients.store_grad_q(inputs, rows.sums.q, grad_q, first, last);
  }

  AttentionInputs in_;
  ChunkedScores scores_;
};

/// Weights as the output of a backend.
template <bool kMeanOverHeads>
struct WeightsBackend {
  static constexpr bool kDifferentiableLse = false;

  static AttentionForward forward(const AttentionInputs& in) {
    const torch::Tensor lse = ChunkedAttention(in).forward().lse;
    return {ChunkedWeights(in).forward(lse, kMeanOverHeads), lse};
  }
  static AttentionGradients backward(const AttentionInputs& in, const AttentionForward& forward,
                                     const ResultGradients& grad, const WantedGradients& wanted) {
    return ChunkedWeights(in).backward(grad.output, forward.lse, wanted);
  }
};

}  // namespace detail

/// The weights that attention(q, k, v, options) gives to the keys, before dropout: [..., H, Lq, Lk], or their mean over
/// the heads [..., Lq, Lk], which is summed up chunk by chunk. Differentiable like attention; the backward pass
/// recomputes the weights from q, k and the log-sum-exp. By ATen operators on any device, whatever the backend in the
/// options; functions of one's own are refused. A query without keys has weights 0; the sink's share is left out.
/// Throws headroom.attention.*.
HEADROOM_KERNEL torch::Tensor attention_weights(const torch::Tensor& q, const torch::Tensor& k,
                                                AttentionOptions options = {}, bool mean_over_heads = false);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor attention_weights(const torch::Tensor& q, const torch::Tensor& k,
                                                AttentionOptions options, bool mean_over_heads) {
  const torch::Tensor no_values = k.defined() && k.dim() > 0 ? k.detach().narrow(-1, 0, 0) : k;
  const auto request = detail::AttentionRequest::check(q, k, no_values, options.dropout(0));
  detail::resolve_backend(q, request, AttentionBackend::chunked);
  using detail::AttentionFunction, detail::WeightsBackend;
  const detail::AttentionInputs in{q, k, no_values, request};
  const torch::Tensor weights = mean_over_heads ? AttentionFunction<WeightsBackend<true>>::run(in).output.squeeze(-3)
                                                : AttentionFunction<WeightsBackend<false>>::run(in).output;
  return weights.to(q.scalar_type());
}
#endif

}  // namespace headroom::inline v0
