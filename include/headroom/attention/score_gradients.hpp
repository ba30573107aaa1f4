#pragma once

#include <torch/types.h>

#include <cstdint>
#include <utility>

#include "headroom/attention/chunk_scores.hpp"
#include "headroom/attention/tiled.hpp"

namespace headroom::inline v0::detail {

/// From the gradient of scores, chunk by chunk, to those of everything that they are made of.
///
/// Sums over many chunks are kept in the dtype of computation, small ones in double. The gradient of q is written, the
/// others are added to.
class ScoreGradients {
 public:
  ScoreGradients(const AttentionInputs& in, const ChunkedScores& scores, const WantedGradients& wanted)
      : in_(in), scores_(scores) {
    const auto zeros = [](bool wanted, const torch::Tensor& x, torch::ScalarType dtype) {
      return wanted ? torch::zeros_like(x, x.options().dtype(dtype)) : torch::Tensor();
    };
    const auto dtype = scores.dtype();
    if (wanted[0]) sums_.q = empty_in_order_of(in.q, in.q.sizes(), in.q.options());
    sums_.k = zeros(wanted[1], in.k, dtype);
    sums_.v = zeros(wanted[2], in.v, dtype);
    sums_.bias = zeros(wanted[3], in.request.bias, dtype);
    sums_.relative_bias = zeros(wanted[4], in.request.relative_bias, torch::kDouble);
    sums_.alibi_slopes = zeros(wanted[5], in.request.alibi_slopes, torch::kDouble);
    sums_.sink = zeros(wanted[6], in.request.sink, torch::kDouble);
    sums_.polar_phase = zeros(wanted[8], in.request.polar_phase, torch::kDouble);
  }

  /// The parts of the sums that belong to some heads, but for the sink.
  AttentionGradients part(const HeadRange& heads, const HeadRange& of_kv) const {
    return {part_of(sums_.q, heads, 2),
            part_of(sums_.k, of_kv, 2),
            part_of(sums_.v, of_kv, 2),
            part_of(sums_.bias, heads, 2),
            part_of(sums_.relative_bias, heads, 1),
            part_of(sums_.alibi_slopes, heads, 1),
            {},
            {},
            part_of(sums_.polar_phase, of_kv, 1)};
  }

  /// A chunk of scores, what they were made of, and where their gradients go.
  struct Chunk {
    const HeadInputs& inputs;
    const ScoreChunk& place;
    const Scores& scores;
    const torch::Tensor &q, &k;  ///< with their positions, q scaled
    const AttentionGradients& sums;
  };
  /// Adds the gradients by a chunk's scores, which is written over as are the capped scores, to the sums and to that of
  /// that q, `grad_q` (undefined: not wanted).
  void add(const Chunk& chunk, torch::Tensor grad_scores, const torch::Tensor& grad_q) const {
    const Scores& s = chunk.scores;
    if (s.hidden.defined()) grad_scores.masked_fill_(s.hidden, 0);  // of a row that is NaN
    add_terms(chunk.inputs.terms, chunk.place, grad_scores, chunk.sums);
    const double softcap = in_.request.softcap;
    if (softcap > 0) grad_scores.mul_(s.capped.div_(softcap).square_().neg_().add_(1));
    if (grad_q.defined()) grad_q.add_(torch::matmul(scores_.folded(grad_scores), chunk.k));
    if (chunk.sums.k.defined() || chunk.sums.polar_phase.defined()) {
      const torch::Tensor grad_k =
          over_sharers(torch::matmul(grad_scores.transpose(-2, -1), scores_.unfolded(chunk.q)));
      const torch::Tensor of_k = scores_.grad_of_keys(chunk.inputs, grad_k, chunk.place, chunk.sums.polar_phase);
      if (chunk.sums.k.defined()) add_rows(chunk.sums.k, chunk.place, of_k);
    }
  }
  /// Turns the gradient of the queries [first, last) with positions and scale into that of q.
  void store_grad_q(const HeadInputs& inputs, const torch::Tensor& target, const torch::Tensor& grad_q, int64_t first,
                    int64_t last) const {
    if (target.defined()) target.slice(2, first, last).copy_(scores_.grad_of_queries(inputs, grad_q, first, last));
  }
  /// Adds x [b,h,keys,D] to rows of the gradient of k or v, whose heads are shared and whose batch may broadcast.
  void add_keys(const torch::Tensor& grad, const ScoreChunk& chunk, const torch::Tensor& x) const {
    add_rows(grad, chunk, over_sharers(x));
  }
  /// `delta` is what is subtracted from each row of dP: the sink has a score and no value, so its dP is 0.
  void add_sink(const torch::Tensor& delta, const SplitLse& lse) const {
    if (!sums_.sink.defined()) return;
    const torch::Tensor weights = torch::exp(in_.request.sink.to(torch::kDouble).unsqueeze(-1) - lse.high - lse.low);
    sums_.sink.sub_((weights * delta).sum_to_size(at::IntArrayRef({in_.request.heads(), 1})).squeeze(-1));
  }

  /// The sums in the dtypes of what they belong to.
  AttentionGradients take() {
    const auto convert = [](torch::Tensor& x, const torch::Tensor& given) {
      if (x.defined()) x = x.to(given.scalar_type());
    };
    convert(sums_.k, in_.k), convert(sums_.v, in_.v), convert(sums_.bias, in_.request.bias);
    convert(sums_.relative_bias, in_.request.relative_bias), convert(sums_.alibi_slopes, in_.request.alibi_slopes);
    convert(sums_.sink, in_.request.sink), convert(sums_.polar_phase, in_.request.polar_phase);
    return std::move(sums_);
  }

 private:
  /// [b,h,keys,D] -> [b,hk,keys,D]. Heads are summed after their matrix product: one product over all would add more
  /// terms in a row and round more.
  torch::Tensor over_sharers(const torch::Tensor& x) const {
    const int64_t shared = in_.request.heads_per_kv_head();
    return shared == 1 ? x : x.unflatten(1, {-1, shared}).sum(2);
  }
  static void add_rows(const torch::Tensor& grad, const ScoreChunk& chunk, const torch::Tensor& x) {
    const torch::Tensor rows = grad.slice(2, chunk.first_key, chunk.end_key);
    rows.add_(x.sum_to_size(rows.sizes()));
  }
  /// Gradients of what is added to the scores.
  static void add_terms(const ScoreTerms& terms, const ScoreChunk& chunk, const torch::Tensor& grad_scores,
                        const AttentionGradients& grad) {
    if (grad.bias.defined()) {
      const torch::Tensor part = ScoreTerms::narrow_scores(grad.bias, chunk);
      part.add_(grad_scores.sum_to_size(part.sizes()));
    }
    if (grad.relative_bias.defined()) {  // [1,h or 1,2R-1]
      const int64_t heads = grad.relative_bias.size(1);
      const torch::Tensor index = terms.relative_index(chunk).flatten().expand({1, heads, -1});
      const torch::Tensor sums =
          grad_scores.sum_to_size({1, heads, grad_scores.size(2), grad_scores.size(3)}).flatten(2);
      grad.relative_bias.add_(torch::zeros(grad.relative_bias.sizes(), sums.options()).scatter_add_(-1, index, sums));
    }
    if (grad.alibi_slopes.defined()) {
      const torch::Tensor part = ScoreTerms::narrow_slopes(grad.alibi_slopes, chunk);
      const torch::Tensor distance = terms.distance(chunk).abs_().to(grad_scores.scalar_type());
      part.sub_((grad_scores * distance).sum(-1).sum_to_size(part.sizes()));
    }
  }

  const AttentionInputs in_;
  const ChunkedScores& scores_;
  AttentionGradients sums_;
};

}  // namespace headroom::inline v0::detail
