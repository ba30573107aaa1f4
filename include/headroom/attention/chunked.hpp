#pragma once

#include "headroom/attention/rotation.hpp"
#include "headroom/attention/scores.hpp"
#include "headroom/attention/tiled.hpp"

namespace headroom::inline v0::detail {

/// What the chunked backend works on at a time: scores [heads of k and v, query heads of each, queries, keys].
struct ChunkSizes {
  int64_t kv_heads, queries, keys;

  /// At most 1024 queries and keys, and about 32 MiB of scores.
  static ChunkSizes for_request(const AttentionRequest& request, torch::ScalarType computed_in) {
    const int64_t budget = (int64_t{32} << 20) / static_cast<int64_t>(c10::elementSize(computed_in));
    const int64_t keys = std::clamp<int64_t>(request.keys(), 1, 1024);
    const int64_t group = std::max<int64_t>(request.group(), 1);
    const int64_t fitting = std::max<int64_t>(budget / (group * keys), 1);
    const int64_t queries = std::min({fitting, int64_t{1024}, std::max<int64_t>(request.queries(), 1)});
    return {std::max<int64_t>(budget / (group * queries * keys), 1), queries, keys};
  }
};

/// True if some log-sum-exps are so large that even in double they have lost the logarithm of the sum.
inline bool is_coarse_lse(const torch::Tensor& lse) {
  static constexpr double kCoarse = 1 << 23;  // from here on, errors of weights may be above 2^-30
  if (lse.is_meta() || lse.numel() == 0) return false;
  return lse.masked_fill(lse == -std::numeric_limits<double>::infinity(), 0).abs().gt(kCoarse).any().item<bool>();
}

/// Attention by ATen operators over chunks of heads, queries and keys, with a running softmax. Computes in float, in
/// double for double.
class ChunkedAttention {
 public:
  ChunkedAttention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                   const AttentionRequest& request, std::optional<ChunkSizes> sizes = std::nullopt)
      : q_(q),
        k_(k),
        v_(v),
        request_(request),
        dtype_(q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat),
        sizes_(sizes.value_or(ChunkSizes::for_request(request, dtype_))),
        terms_(request, q.device()) {
    if (terms_.hides()) {
      bad_queries_ = rows_not_finite(q);
      bad_keys_ = either(rows_not_finite(k), rows_not_finite(v));
    }
    if (request.rotary.defined()) {
      const RotaryRows rows(request);
      query_rows_ = rows.query.to(q.device());
      key_rows_ = rows.key.to(q.device());
    }
  }

  AttentionForward forward() const {
    std::vector<int64_t> shape = q_.sizes().vec();
    shape.back() = v_.size(-1);
    const torch::Tensor output = empty_in_order_of(q_, shape, q_.options());
    const torch::Tensor lse = torch::empty(all_but_last(shape, 1), q_.options().dtype(torch::kDouble));
    for_each_block([&](const HeadBlock& block, const HeadBlock& kv_block) {
      const Block part = block_at(block, kv_block);
      const torch::Tensor out = block_of(output, block, 2), out_lse = block_of(lse, block, 1);
      for_each_query_chunk([&](int64_t first, int64_t last) { forward_queries(part, first, last, out, out_lse); });
    });
    return {output, lse};
  }

  /// `wanted`: gradients of q, k, v, bias, relative_bias, alibi_slopes, sink.
  AttentionGradients backward(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                              const AttentionForward& forward, const std::array<bool, 7>& wanted) {
    AttentionGradients grad = empty_gradients(wanted);
    // Derivative of the loss by log-sum-exp and by output: both change what is subtracted from each row of dP
    torch::Tensor delta = (grad_output.to(dtype_) * forward.output.to(dtype_)).sum(-1);  // [...,H,Lq]
    if (const torch::Tensor bad = terms_.hides() ? rows_not_finite(grad_output) : torch::Tensor(); bad.defined()) {
      bad_queries_ = either(bad_queries_, bad);
      delta.masked_fill_(bad.logical_and((forward.output == 0).all(-1)), 0);  // of a query without keys
    }
    if (grad_lse.defined()) delta = delta - grad_lse.to(dtype_).masked_fill(forward.lse == -kInfinity, 0);
    const SplitLse lse(forward.lse, dtype_);
    for_each_block([&](const HeadBlock& block, const HeadBlock& kv_block) {
      const Rows rows{block_of(grad_output, block, 2), block_of(delta, block, 1), lse.of(block)};
      const AttentionGradients part = gradients_at(grad, block, kv_block);
      const Block inputs = block_at(block, kv_block);
      for_each_query_chunk([&](int64_t first, int64_t last) { backward_queries(inputs, first, last, rows, part); });
    });
    add_sink(grad.sink, delta, lse);
    return as_given(std::move(grad));
  }

  /// The weights before dropout [..., H, Lq, Lk], or their mean over the heads [..., 1, Lq, Lk].
  torch::Tensor weights(const torch::Tensor& whole_lse, bool mean_over_heads) const {
    std::vector<int64_t> shape = request_.score_sizes;
    if (mean_over_heads) shape.end()[-3] = 1;
    const torch::Tensor all = torch::zeros(shape, q_.options().dtype(dtype_));
    const SplitLse lse(whole_lse, dtype_);
    for_each_block([&](const HeadBlock& block, const HeadBlock& kv_block) {
      const Block inputs = block_at(block, kv_block);
      const SplitLse rows = lse.of(block);
      const torch::Tensor target = block_of(all, block, 2);
      for_each_query_chunk([&](int64_t first, int64_t last) {
        const torch::Tensor q = queries(inputs, first, last);
        sharpen(rows, inputs, q, first, last);
        for_each_tile(inputs, first, last, [&](const ScoreTile& tile) {
          Scores s = scores(inputs, q, keys(inputs, tile), tile);
          const torch::Tensor part = ScoreTerms::narrow_scores(target, tile);
          part.add_(take_weights(s, rows, tile).sum_to_size(part.sizes()));
        });
      });
    });
    return mean_over_heads ? all.div_(std::max<int64_t>(request_.heads(), 1)) : all;
  }

  /// Gradients of all but v by the gradient of weights(…), of that shape.
  AttentionGradients weights_backward(const torch::Tensor& grad_weights, const torch::Tensor& whole_lse,
                                      std::array<bool, 7> wanted) const {
    wanted[2] = false;
    AttentionGradients grad = empty_gradients(wanted);
    const double share = grad_weights.size(-3) < request_.heads() ? 1.0 / static_cast<double>(request_.heads()) : 1.0;
    const SplitLse lse(whole_lse, dtype_);
    const torch::Tensor delta = torch::empty(whole_lse.sizes(), whole_lse.options().dtype(dtype_));
    for_each_block([&](const HeadBlock& block, const HeadBlock& kv_block) {
      const Block inputs = block_at(block, kv_block);
      const SplitLse rows = lse.of(block);
      const AttentionGradients part = gradients_at(grad, block, kv_block);
      const torch::Tensor grad_block = block_of(grad_weights, block, 2), delta_block = block_of(delta, block, 1);
      const auto grad_of = [&](const ScoreTile& tile) {
        return ScoreTerms::narrow_scores(grad_block, tile).to(dtype_) * share;
      };
      for_each_query_chunk([&](int64_t first, int64_t last) {
        const torch::Tensor q = queries(inputs, first, last);
        sharpen(rows, inputs, q, first, last);
        // The gradient of a score, P·(dP - sum of P·dP over the row), needs the whole row first
        const torch::Tensor sums = delta_block.slice(2, first, last).zero_();
        for_each_tile(inputs, first, last, [&](const ScoreTile& tile) {
          Scores s = scores(inputs, q, keys(inputs, tile), tile);
          torch::Tensor products = take_weights(s, rows, tile) * grad_of(tile);
          if (s.hidden.defined()) products.masked_fill_(s.hidden, 0);  // where the gradient is not finite
          sums.add_(products.sum(-1));
        });
        torch::Tensor grad_q;
        if (part.q.defined()) grad_q = torch::zeros_like(q);
        for_each_tile(inputs, first, last, [&](const ScoreTile& tile) {
          const torch::Tensor k = keys(inputs, tile);
          Scores s = scores(inputs, q, k, tile);
          const torch::Tensor weights = take_weights(s, rows, tile);
          add_score_gradients(inputs, tile, s, (grad_of(tile) - sums.unsqueeze(-1)).mul_(weights), q, k, grad_q, part);
        });
        store_grad_q(part.q, grad_q, first, last);
      });
    });
    add_sink(grad.sink, delta, lse);
    return as_given(std::move(grad));
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  /// Inputs of a block of heads.
  struct Block {
    torch::Tensor q, k, v;                // [b,h,Lq,D], [b or 1,hk,Lk,D], [b or 1,hk,Lk,Dv]
    torch::Tensor bad_queries, bad_keys;  // [b,h,Lq], [b or 1,hk,Lk]
    ScoreTerms terms;
  };
  /// The log-sum-exp in two parts that the dtype of computation holds exactly; 0 for a query without keys.
  struct SplitLse {
    torch::Tensor high, low;  // [...,H,Lq]
    bool coarse = false;
    SplitLse(torch::Tensor high, torch::Tensor low, bool coarse)
        : high(std::move(high)), low(std::move(low)), coarse(coarse) {}
    SplitLse(const torch::Tensor& lse, torch::ScalarType dtype) {
      const torch::Tensor whole = lse.masked_fill(lse == -kInfinity, 0);
      high = whole.to(dtype);
      low = (whole - high).to(dtype);
      coarse = is_coarse_lse(whole);
    }
    SplitLse of(const HeadBlock& block) const { return {block_of(high, block, 1), block_of(low, block, 1), coarse}; }
  };
  /// What the backward pass knows of each query.
  struct Rows {
    torch::Tensor grad_output, delta;
    SplitLse lse;
  };

  /// Sums over many tiles are kept in the dtype of computation, small ones in double. The gradient of q is written, the
  /// others are added to.
  AttentionGradients empty_gradients(const std::array<bool, 7>& wanted) const {
    const auto zeros = [](bool wanted, const torch::Tensor& x, torch::ScalarType dtype) {
      return wanted ? torch::zeros_like(x, x.options().dtype(dtype)) : torch::Tensor();
    };
    return {wanted[0] ? empty_in_order_of(q_, q_.sizes(), q_.options()) : torch::Tensor(),
            zeros(wanted[1], k_, dtype_),
            zeros(wanted[2], v_, dtype_),
            zeros(wanted[3], request_.bias, dtype_),
            zeros(wanted[4], request_.relative_bias, torch::kDouble),
            zeros(wanted[5], request_.alibi_slopes, torch::kDouble),
            zeros(wanted[6], request_.sink, torch::kDouble)};
  }
  static AttentionGradients gradients_at(const AttentionGradients& grad, const HeadBlock& block,
                                         const HeadBlock& kv_block) {
    return {
        block_of(grad.q, block, 2),    block_of(grad.k, kv_block, 2),          block_of(grad.v, kv_block, 2),
        block_of(grad.bias, block, 2), block_of(grad.relative_bias, block, 1), block_of(grad.alibi_slopes, block, 1)};
  }
  AttentionGradients as_given(AttentionGradients grad) const {
    const auto convert = [](torch::Tensor& x, const torch::Tensor& given) {
      if (x.defined()) x = x.to(given.scalar_type());
    };
    convert(grad.k, k_), convert(grad.v, v_), convert(grad.bias, request_.bias);
    convert(grad.relative_bias, request_.relative_bias), convert(grad.alibi_slopes, request_.alibi_slopes);
    convert(grad.sink, request_.sink);
    return grad;
  }
  /// `delta` is what is subtracted from each row of dP: the sink has a score and no value, so its dP is 0.
  void add_sink(const torch::Tensor& grad_sink, const torch::Tensor& delta, const SplitLse& lse) const {
    if (!grad_sink.defined()) return;
    const torch::Tensor weights = torch::exp(request_.sink.to(torch::kDouble).unsqueeze(-1) - lse.high - lse.low);
    grad_sink.sub_((weights * delta).sum_to_size(at::IntArrayRef({request_.heads(), 1})).squeeze(-1));
  }

  Block block_at(const HeadBlock& block, const HeadBlock& kv_block) const {
    return {block_of(q_, block, 2),           block_of(k_, kv_block, 2),        block_of(v_, kv_block, 2),
            block_of(bad_queries_, block, 1), block_of(bad_keys_, kv_block, 1), terms_.of(block)};
  }

  template <class F>
  void for_each_block(F&& f) const {
    const int64_t kv_heads = std::max<int64_t>(request_.kv_heads, 1);
    for_each_head_block(request_, std::max<int64_t>(sizes_.kv_heads / kv_heads, 1), std::min(sizes_.kv_heads, kv_heads),
                        f);
  }

  template <class F>
  void for_each_query_chunk(F&& f) const {
    for (int64_t i = 0; i < request_.queries(); i += sizes_.queries) {
      f(i, std::min(i + sizes_.queries, request_.queries()));
    }
  }

  template <class F>
  void for_each_tile(const Block& block, int64_t first, int64_t last, F&& f) const {
    const auto [begin, end] = block.terms.keys(first, last);
    for (int64_t j = begin; j < end; j += sizes_.keys) {
      const ScoreTile tile{first, last, j, std::min(j + sizes_.keys, end)};
      if (block.terms.may_see(tile)) f(tile);
    }
  }

  /// Query heads that share a head of k are rows of one matrix: [b,h,L,D] <-> [b,hk,h/hk·L,D].
  torch::Tensor folded(const torch::Tensor& x) const {
    return request_.group() == 1
               ? x
               : x.reshape({x.size(0), x.size(1) / request_.group(), x.size(2) * request_.group(), x.size(3)});
  }
  torch::Tensor unfolded(const torch::Tensor& x) const {
    return request_.group() == 1
               ? x
               : x.reshape({x.size(0), x.size(1) * request_.group(), x.size(2) / request_.group(), x.size(3)});
  }

  static torch::Tensor rows_of(const torch::Tensor& x, int64_t dim, int64_t first, int64_t last) {
    return x.defined() ? x.slice(dim, first, last) : x;
  }

  /// scale·q of a chunk of queries, rotated, in the dtype of computation.
  torch::Tensor queries(const Block& block, int64_t first, int64_t last) const {
    torch::Tensor q =
        without_rows(rows_of(block.q, 2, first, last).to(dtype_), rows_of(block.bad_queries, 2, first, last));
    if (request_.rotary.defined()) q = rotated(q, request_.rotary, rows_of(query_rows_, 0, first, last));
    return folded(q * request_.scale);
  }
  torch::Tensor keys(const Block& block, const ScoreTile& tile) const {
    const torch::Tensor k = key_part(block.k, block, tile);
    if (!request_.rotary.defined()) return k;
    return rotated(k, request_.rotary, rows_of(key_rows_, 0, tile.first_key, tile.end_key));
  }
  torch::Tensor key_part(const torch::Tensor& x, const Block& block, const ScoreTile& tile) const {
    return without_rows(rows_of(x, 2, tile.first_key, tile.end_key).to(dtype_),
                        rows_of(block.bad_keys, 2, tile.first_key, tile.end_key));
  }

  struct Scores {
    torch::Tensor capped, all;  // [b,h,queries,keys], before and after what is added; all may be written over
    torch::Tensor hidden;
  };
  Scores scores(const Block& block, const torch::Tensor& q, const torch::Tensor& k, const ScoreTile& tile) const {
    Scores s;
    s.capped = block.terms.capped(unfolded(torch::matmul(q, k.transpose(-2, -1))));
    s.all = block.terms.added(s.capped, tile);
    s.hidden = block.terms.hidden(tile);
    if (request_.softcap <= 0) {
      s.capped.reset();
    } else if (s.all.is_same(s.capped)) {
      s.all = s.capped.clone();
    }
    if (block.bad_queries.defined()) {
      s.all.masked_fill_(rows_of(block.bad_queries, 2, tile.first_query, tile.end_query).unsqueeze(-1), kNaN);
    }
    if (block.bad_keys.defined()) {
      const torch::Tensor bad = rows_of(block.bad_keys, 2, tile.first_key, tile.end_key);
      s.all.masked_fill_(bad.repeat_interleave(request_.group(), 1).unsqueeze(-2), kNaN);
    }
    return s;
  }

  /// A softmax over scores that come tile by tile.
  struct RunningSoftmax {
    torch::Tensor maximum, sum;  // [b,h,queries,1]; the sum is of exp(score - maximum)

    /// Of `count` queries. The sink is a score that is already there.
    RunningSoftmax(const Block& block, int64_t count, const torch::TensorOptions& options) {
      const std::vector<int64_t> sizes{block.q.size(0), block.q.size(1), count, 1};
      if (const torch::Tensor& sink = block.terms.sink; sink.defined()) {
        maximum = sink.to(options.dtype()).unsqueeze(-1).unsqueeze(-1).expand(sizes);
        sum = (maximum != -kInfinity).to(options.dtype());
      } else {
        maximum = torch::full(sizes, -kInfinity, options), sum = torch::zeros(sizes, options);
      }
    }
    /// Turns the scores of a tile into exp(score - maximum), in place, and returns the factor by which what belongs to
    /// tiles before shrinks, since the maximum rose.
    torch::Tensor add(Scores& s) {
      if (s.hidden.defined()) s.all.masked_fill_(s.hidden, -kInfinity);
      const torch::Tensor higher = torch::maximum(maximum, s.all.amax(-1, /*keepdim=*/true));
      const torch::Tensor shift = higher.masked_fill(higher == -kInfinity, 0);
      const torch::Tensor shrink = (maximum - shift).exp_();
      sum = sum * shrink + s.all.sub_(shift).exp_().sum(-1, /*keepdim=*/true);
      maximum = higher;
      return shrink;
    }
  };

  void forward_queries(const Block& block, int64_t first, int64_t last, const torch::Tensor& output,
                       const torch::Tensor& lse) const {
    const torch::Tensor q = queries(block, first, last);
    const int64_t count = last - first;
    RunningSoftmax softmax(block, count, q.options());
    torch::Tensor mean = torch::zeros({block.q.size(0), block.q.size(1), count, block.v.size(3)}, q.options());
    for_each_tile(block, first, last, [&](const ScoreTile& tile) {
      Scores s = scores(block, q, keys(block, tile), tile);
      const torch::Tensor shrink = softmax.add(s);
      if (request_.dropout.active()) s.all.mul_(block.terms.kept(tile));
      mean.mul_(shrink).add_(unfolded(torch::matmul(folded(s.all), key_part(block.v, block, tile))));
    });
    if (request_.dropout.active()) mean.mul_(request_.dropout.gain());
    const auto& [maximum, sum] = softmax;
    output.slice(2, first, last).copy_(mean.div_(sum.masked_fill(sum == 0, 1)));
    lse.slice(2, first, last).copy_((maximum.to(torch::kDouble) + sum.to(torch::kDouble).log()).squeeze(-1));
  }

  /// Where a log-sum-exp is too coarse, replaces its two parts by the maximum and the logarithm of the sum, which takes
  /// another pass over the scores of these queries.
  void sharpen(const SplitLse& lse, const Block& block, const torch::Tensor& q, int64_t first, int64_t last) const {
    if (!lse.coarse) return;
    RunningSoftmax softmax(block, last - first, q.options());
    for_each_tile(block, first, last, [&](const ScoreTile& tile) {
      Scores s = scores(block, q, keys(block, tile), tile);
      softmax.add(s);
    });
    const torch::Tensor empty = softmax.sum == 0;
    lse.high.slice(2, first, last).copy_(softmax.maximum.masked_fill(empty, 0).squeeze(-1));
    lse.low.slice(2, first, last).copy_(softmax.sum.masked_fill(empty, 1).log_().squeeze(-1));
  }

  void backward_queries(const Block& block, int64_t first, int64_t last, const Rows& rows,
                        const AttentionGradients& grad) const {
    const torch::Tensor q = queries(block, first, last);
    sharpen(rows.lse, block, q, first, last);
    const torch::Tensor grad_output = folded(
        without_rows(rows_of(rows.grad_output, 2, first, last).to(dtype_), rows_of(block.bad_queries, 2, first, last)));
    const torch::Tensor delta = rows.delta.slice(2, first, last).unsqueeze(-1);
    torch::Tensor grad_q;
    if (grad.q.defined()) grad_q = torch::zeros_like(q);
    for_each_tile(block, first, last, [&](const ScoreTile& tile) {
      const torch::Tensor k = keys(block, tile), v = key_part(block.v, block, tile);
      Scores s = scores(block, q, k, tile);
      torch::Tensor weights = take_weights(s, rows.lse, tile);
      torch::Tensor grad_scores = unfolded(torch::matmul(grad_output, v.transpose(-2, -1)));  // of the weights, so far
      torch::Tensor dropped = weights;
      if (request_.dropout.active()) {
        const torch::Tensor factor = block.terms.kept(tile).to(dtype_).mul_(request_.dropout.gain());
        dropped = weights * factor;
        grad_scores.mul_(factor);
      }
      if (grad.v.defined()) {
        add_keys(grad.v, tile, torch::matmul(dropped.transpose(-2, -1), unfolded(grad_output)));
      }
      dropped.reset();
      grad_scores.sub_(delta).mul_(weights);
      weights.reset();
      add_score_gradients(block, tile, s, grad_scores, q, k, grad_q, grad);
    });
    store_grad_q(grad.q, grad_q, first, last);
  }

  /// exp(scores - lse), 0 where hidden, in the memory of s.all.
  static torch::Tensor take_weights(Scores& s, const SplitLse& lse, const ScoreTile& tile) {
    const auto column = [&](const torch::Tensor& x) {
      return x.slice(2, tile.first_query, tile.end_query).unsqueeze(-1);
    };
    torch::Tensor weights = std::exchange(s.all, {}).sub_(column(lse.high)).sub_(column(lse.low)).exp_();
    if (s.hidden.defined()) weights.masked_fill_(s.hidden, 0);
    return weights;
  }

  /// From the gradient of a tile's scores, which is written over, to those of what is added to them and of k, and to
  /// that of the rotated and scaled q, `grad_q` (undefined: not wanted). `s.capped` is written over.
  void add_score_gradients(const Block& block, const ScoreTile& tile, const Scores& s, torch::Tensor grad_scores,
                           const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& grad_q,
                           const AttentionGradients& grad) const {
    if (s.hidden.defined()) grad_scores.masked_fill_(s.hidden, 0);  // of a row that is NaN
    add_terms(block.terms, tile, grad_scores, grad);
    if (request_.softcap > 0) grad_scores.mul_(s.capped.div_(request_.softcap).square_().neg_().add_(1));
    if (grad_q.defined()) grad_q.add_(torch::matmul(folded(grad_scores), k));
    if (grad.k.defined()) {
      torch::Tensor grad_k = torch::matmul(grad_scores.transpose(-2, -1), unfolded(q));
      if (request_.rotary.defined()) {
        grad_k = rotated(grad_k, request_.rotary.conj(), rows_of(key_rows_, 0, tile.first_key, tile.end_key));
      }
      add_keys(grad.k, tile, grad_k);
    }
  }

  /// Turns the gradient of the rotated and scaled queries into that of q.
  void store_grad_q(const torch::Tensor& target, torch::Tensor grad_q, int64_t first, int64_t last) const {
    if (!target.defined()) return;
    grad_q = unfolded(grad_q).mul_(request_.scale);
    if (request_.rotary.defined()) {
      grad_q = rotated(grad_q, request_.rotary.conj(), rows_of(query_rows_, 0, first, last));
    }
    target.slice(2, first, last).copy_(grad_q);
  }

  /// Adds x [b,h,keys,D] to rows of the gradient of k or v, whose heads are shared and whose batch may broadcast. Heads
  /// are summed after their matrix product: one product over all would add more terms in a row and round more.
  void add_keys(const torch::Tensor& grad, const ScoreTile& tile, const torch::Tensor& x) const {
    const torch::Tensor rows = grad.slice(2, tile.first_key, tile.end_key);
    const torch::Tensor shared = request_.group() == 1 ? x : x.unflatten(1, {-1, request_.group()}).sum(2);
    rows.add_(shared.sum_to_size(rows.sizes()));
  }

  /// Gradients of what is added to the scores.
  static void add_terms(const ScoreTerms& terms, const ScoreTile& tile, const torch::Tensor& grad_scores,
                        const AttentionGradients& grad) {
    if (grad.bias.defined()) {
      const torch::Tensor part = ScoreTerms::narrow_scores(grad.bias, tile);
      part.add_(grad_scores.sum_to_size(part.sizes()));
    }
    if (grad.relative_bias.defined()) {  // [1,h or 1,2R-1]
      const int64_t heads = grad.relative_bias.size(1);
      const torch::Tensor index = terms.relative_index(tile).flatten().expand({1, heads, -1});
      const torch::Tensor sums =
          grad_scores.sum_to_size({1, heads, grad_scores.size(2), grad_scores.size(3)}).flatten(2);
      grad.relative_bias.add_(torch::zeros(grad.relative_bias.sizes(), sums.options()).scatter_add_(-1, index, sums));
    }
    if (grad.alibi_slopes.defined()) {
      const torch::Tensor part = ScoreTerms::narrow_slopes(grad.alibi_slopes, tile);
      const torch::Tensor distance = terms.distance(tile).abs_().to(grad_scores.scalar_type());
      part.sub_((grad_scores * distance).sum(-1).sum_to_size(part.sizes()));
    }
  }

  const torch::Tensor &q_, &k_, &v_;
  const AttentionRequest& request_;
  torch::ScalarType dtype_;
  ChunkSizes sizes_;
  ScoreTerms terms_;
  torch::Tensor bad_queries_, bad_keys_;  // rows that are not finite; undefined: none, or nothing is hidden
  torch::Tensor query_rows_, key_rows_;
};

struct ChunkedBackend {
  static constexpr bool kDifferentiableLse = true;

  static AttentionForward forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                  const AttentionRequest& request) {
    return ChunkedAttention(q, k, v, request).forward();
  }
  static AttentionGradients backward(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                                     const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                     const AttentionForward& forward, const AttentionRequest& request,
                                     const std::array<bool, 7>& wanted) {
    return ChunkedAttention(q, k, v, request).backward(grad_output, grad_lse, forward, wanted);
  }
};

}  // namespace headroom::inline v0::detail
