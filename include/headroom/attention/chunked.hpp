#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>

#include "headroom/attention/score_gradients.hpp"

namespace headroom::inline v0::detail {

/// Attention by ATen operators over chunks of heads, queries and keys, with a running softmax, on any device.
class ChunkedAttention {
 public:
  explicit ChunkedAttention(const AttentionInputs& in, std::optional<ChunkSizes> sizes = std::nullopt)
      : in_(in), scores_(in, sizes) {}

  AttentionForward forward() const {
    std::vector<int64_t> shape = in_.q.sizes().vec();
    shape.back() = in_.v.size(-1);
    const torch::Tensor output = empty_in_order_of(in_.q, shape, in_.q.options());
    const torch::Tensor lse = torch::empty(all_but_last(shape, 1), in_.q.options().dtype(torch::kDouble));
    scores_.for_each_head_range([&](const HeadInputs& inputs, const HeadRange& heads, const HeadRange&) {
      const AttentionForward part{part_of(output, heads, 2), part_of(lse, heads, 1)};
      scores_.for_each_query_chunk([&](int64_t first, int64_t last) { forward_queries(inputs, first, last, part); });
    });
    return {output, lse};
  }

  AttentionGradients backward(const AttentionForward& forward, const ResultGradients& grad,
                              const WantedGradients& wanted) {
    ScoreGradients gradients(in_, scores_, wanted);
    // Derivative of the loss by log-sum-exp and by output: both change what is subtracted from each row of dP
    const auto dtype = scores_.dtype();
    torch::Tensor delta = (grad.output.to(dtype) * forward.output.to(dtype)).sum(-1);  // [...,H,Lq]
    if (const torch::Tensor bad = scores_.hides() ? rows_not_finite(grad.output) : torch::Tensor(); bad.defined()) {
      scores_.add_bad_queries(bad);
      delta.masked_fill_(bad.logical_and((forward.output == 0).all(-1)), 0);  // of a query without keys
    }
    if (grad.lse.defined()) {
      delta = delta - grad.lse.to(dtype).masked_fill(forward.lse == -RunningSoftmax::kInfinity, 0);
    }
    const SplitLse lse(forward.lse, dtype);
    scores_.for_each_head_range([&](const HeadInputs& inputs, const HeadRange& heads, const HeadRange& of_kv) {
      const Rows rows{part_of(grad.output, heads, 2), part_of(delta, heads, 1), lse.of(heads),
                      gradients.part(heads, of_kv), gradients};
      scores_.for_each_query_chunk([&](int64_t first, int64_t last) { backward_queries(inputs, first, last, rows); });
    });
    gradients.add_sink(delta, lse);
    return gradients.take();
  }

 private:
  /// What the backward pass knows of the queries of some heads, and where their gradients go.
  struct Rows {
    torch::Tensor grad_output, delta;
    SplitLse lse;
    AttentionGradients sums;
    const ScoreGradients& gradients;
  };

  void forward_queries(const HeadInputs& inputs, int64_t first, int64_t last, const AttentionForward& result) const {
    const auto& dropout = in_.request.dropout;
    const torch::Tensor q = scores_.queries(inputs, first, last);
    RunningSoftmax softmax = scores_.softmax(inputs, last - first);
    torch::Tensor mean =
        torch::zeros({inputs.q.size(0), inputs.q.size(1), last - first, inputs.v.size(3)}, q.options());
    scores_.for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
      Scores s = scores_.scores(inputs, q, scores_.keys(inputs, chunk), chunk);
      const torch::Tensor shrink = softmax.add(s.all, s.hidden);
      if (dropout.active()) s.all.mul_(inputs.terms.kept(chunk));
      const torch::Tensor part = torch::matmul(scores_.folded(s.all), scores_.values(inputs, chunk));
      mean.mul_(shrink).add_(scores_.unfolded(part));
    });
    if (dropout.active()) mean.mul_(dropout.gain());
    const auto& [maximum, sum] = softmax;
    result.output.slice(2, first, last).copy_(mean.div_(sum.masked_fill(sum == 0, 1)));
    result.lse.slice(2, first, last).copy_((maximum.to(torch::kDouble) + sum.to(torch::kDouble).log()).squeeze(-1));
  }

  void backward_queries(const HeadInputs& inputs, int64_t first, int64_t last, const Rows& rows) const {
    const auto& dropout = in_.request.dropout;
    const torch::Tensor q = scores_.queries(inputs, first, last);
    scores_.sharpen(rows.lse, inputs, q, {first, last});
    const torch::Tensor grad_output =
        scores_.folded(without_rows(ChunkedScores::rows_of(rows.grad_output, 2, first, last).to(scores_.dtype()),
                                    ChunkedScores::rows_of(inputs.bad_queries, 2, first, last)));
    const torch::Tensor delta = rows.delta.slice(2, first, last).unsqueeze(-1);
    torch::Tensor grad_q;
    if (rows.sums.q.defined()) grad_q = torch::zeros_like(q);
    scores_.for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
      const torch::Tensor k = scores_.keys(inputs, chunk), v = scores_.values(inputs, chunk);
      Scores s = scores_.scores(inputs, q, k, chunk);
      torch::Tensor weights = ChunkedScores::take_weights(s, rows.lse, chunk);
      // of the weights, so far
      torch::Tensor grad_scores = scores_.unfolded(torch::matmul(grad_output, v.transpose(-2, -1)));
      torch::Tensor dropped = weights;
      if (dropout.active()) {
        const torch::Tensor factor = inputs.terms.kept(chunk).to(scores_.dtype()).mul_(dropout.gain());
        dropped = weights * factor;
        grad_scores.mul_(factor);
      }
      if (rows.sums.v.defined()) {
        rows.gradients.add_keys(rows.sums.v, chunk,
                                torch::matmul(dropped.transpose(-2, -1), scores_.unfolded(grad_output)));
      }
      dropped.reset();
      grad_scores.sub_(delta).mul_(weights);
      weights.reset();
      rows.gradients.add({inputs, chunk, s, q, k, rows.sums}, grad_scores, grad_q);
    });
    rows.gradients.store_grad_q(inputs, rows.sums.q, grad_q, first, last);
  }

  AttentionInputs in_;
  ChunkedScores scores_;
};

struct ChunkedBackend {
  static constexpr bool kDifferentiableLse = true;

  static AttentionForward forward(const AttentionInputs& in) { return ChunkedAttention(in).forward(); }
  static AttentionGradients backward(const AttentionInputs& in, const AttentionForward& forward,
                                     const ResultGradients& grad, const WantedGradients& wanted) {
    return ChunkedAttention(in).backward(forward, grad, wanted);
  }
};

}  // namespace headroom::inline v0::detail
