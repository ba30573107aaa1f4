#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>

#include "headroom/attention/backend.hpp"
#include "headroom/attention/polar.hpp"
#include "headroom/attention/rotation.hpp"
#include "headroom/attention/running_softmax.hpp"
#include "headroom/attention/scores.hpp"

namespace headroom::inline v0::detail {

/// What the chunked backend works on at a time: scores [heads of k and v, query heads of each, queries, keys].
struct ChunkSizes {
  int64_t kv_heads, queries, keys;

  /// At most 1024 queries and keys, and about 32 MiB of scores.
  static ChunkSizes for_request(const AttentionRequest& request, torch::ScalarType computed_in) {
    const int64_t budget = (int64_t{32} << 20) / static_cast<int64_t>(c10::elementSize(computed_in));
    const int64_t keys = std::clamp<int64_t>(request.keys(), 1, 1024);
    const int64_t shared = std::max<int64_t>(request.heads_per_kv_head(), 1);
    const int64_t fitting = std::max<int64_t>(budget / (shared * keys), 1);
    const int64_t queries = std::min({fitting, int64_t{1024}, std::max<int64_t>(request.queries(), 1)});
    return {std::max<int64_t>(budget / (shared * queries * keys), 1), queries, keys};
  }
};

/// The inputs of some heads.
struct HeadInputs {
  torch::Tensor q, k, v;                // [b,h,Lq,D], [b or 1,hk,Lk,D], [b or 1,hk,Lk,Dv]
  torch::Tensor bad_queries, bad_keys;  // [b,h,Lq], [b or 1,hk,Lk]
  torch::Tensor phase;                  // [1,hk,D] of polar positions, or undefined
  ScoreTerms terms;
};

/// Scores of a chunk, [b,h,queries,keys], before and after what is added to them; all may be written over.
struct Scores {
  torch::Tensor capped, all;
  torch::Tensor hidden;  // undefined: all are seen
};

/// The scores of a request chunk by chunk: an order to go through them, and what they are. In float, in double for
/// double.
class ChunkedScores {
 public:
  ChunkedScores(const AttentionInputs& in, std::optional<ChunkSizes> sizes)
      : q_(in.q),
        k_(in.k),
        v_(in.v),
        request_(in.request),
        dtype_(in.q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat),
        sizes_(sizes.value_or(ChunkSizes::for_request(in.request, dtype_))),
        terms_(in.request, in.q.device()) {
    if (terms_.hides()) {
      bad_queries_ = rows_not_finite(q_);
      bad_keys_ = either(rows_not_finite(k_), rows_not_finite(v_));
    }
    if (request_.rotary.defined() || request_.polar.defined()) {
      const TableRows rows(request_);
      query_rows_ = rows.query.to(q_.device());
      key_rows_ = rows.key.to(q_.device());
    }
  }

  const AttentionRequest& request() const { return request_; }
  torch::ScalarType dtype() const { return dtype_; }
  bool hides() const { return terms_.hides(); }
  /// Queries [..., H, Lq] that count as not finite beside those that are.
  void add_bad_queries(const torch::Tensor& bad) { bad_queries_ = either(bad_queries_, bad); }

  /// f(inputs, heads, the same in heads of k and v)
  template <class F>
  void for_each_head_range(F&& f) const {
    const int64_t kv_heads = std::max<int64_t>(request_.kv_heads, 1);
    detail::for_each_head_range(
        request_, std::max<int64_t>(sizes_.kv_heads / kv_heads, 1), std::min(sizes_.kv_heads, kv_heads),
        [&](const HeadRange& heads, const HeadRange& of_kv) { f(inputs_of(heads, of_kv), heads, of_kv); });
  }
  /// f(first, end) of queries
  template <class F>
  void for_each_query_chunk(F&& f) const {
    for (int64_t i = 0; i < request_.queries(); i += sizes_.queries) {
      f(i, std::min(i + sizes_.queries, request_.queries()));
    }
  }
  /// f(chunk) for what queries [first, last) may see
  template <class F>
  void for_each_chunk(const HeadInputs& inputs, int64_t first, int64_t last, F&& f) const {
    for (const auto [begin, end] : inputs.terms.keys(first, last)) {
      for (int64_t j = begin; j < end; j += sizes_.keys) {
        const ScoreChunk chunk{first, last, j, std::min<int64_t>(j + sizes_.keys, end)};
        if (inputs.terms.may_see(chunk)) f(chunk);
      }
    }
  }

  /// Query heads that share a head of k are rows of one matrix: [b,h,L,D] <-> [b,hk,h/hk·L,D].
  torch::Tensor folded(const torch::Tensor& x) const {
    const int64_t shared = request_.heads_per_kv_head();
    return shared == 1 ? x : x.reshape({x.size(0), x.size(1) / shared, x.size(2) * shared, x.size(3)});
  }
  torch::Tensor unfolded(const torch::Tensor& x) const {
    const int64_t shared = request_.heads_per_kv_head();
    return shared == 1 ? x : x.reshape({x.size(0), x.size(1) * shared, x.size(2) / shared, x.size(3)});
  }

  /// scale·q of some queries, folded, and keys: rotated, or in polar form with twice as many features.
  torch::Tensor queries(const HeadInputs& inputs, int64_t first, int64_t last) const {
    torch::Tensor q = finite_queries(inputs, first, last);
    if (request_.rotary.defined()) q = rotated(q, request_.rotary, rows_of(query_rows_, 0, first, last));
    if (request_.polar.defined()) q = polar_pairs(q, turns_of_queries(first, last));
    return folded(q * request_.scale);
  }
  torch::Tensor keys(const HeadInputs& inputs, const ScoreChunk& chunk) const {
    const torch::Tensor k = finite_keys(inputs.k, inputs, chunk);
    if (request_.polar.defined()) return polar_pairs(k, turns_of_keys(inputs, chunk));
    if (!request_.rotary.defined()) return k;
    return rotated(k, request_.rotary, rows_of(key_rows_, 0, chunk.first_key, chunk.end_key));
  }
  torch::Tensor values(const HeadInputs& inputs, const ScoreChunk& chunk) const {
    return finite_keys(inputs.v, inputs, chunk);
  }
  /// Gradients by what queries() and keys() return, turned back, of q and of k.
  torch::Tensor grad_of_queries(const HeadInputs& inputs, const torch::Tensor& grad, int64_t first,
                                int64_t last) const {
    const torch::Tensor grad_q = unfolded(grad).mul_(request_.scale);
    if (request_.polar.defined()) {
      return feature_gradient(grad_q, finite_queries(inputs, first, last), turns_of_queries(first, last));
    }
    if (!request_.rotary.defined()) return grad_q;
    return rotated(grad_q, request_.rotary.conj(), rows_of(query_rows_, 0, first, last));
  }
  /// That of polar phases is added to `phase` [1,hk,D], unless it is undefined.
  torch::Tensor grad_of_keys(const HeadInputs& inputs, const torch::Tensor& grad, const ScoreChunk& chunk,
                             const torch::Tensor& phase) const {
    if (request_.polar.defined()) {
      const torch::Tensor k = finite_keys(inputs.k, inputs, chunk);
      const Turns turns = turns_of_keys(inputs, chunk);
      if (phase.defined()) phase.add_(phase_gradient(grad, k, turns, phase.sizes()));
      return feature_gradient(grad, k, turns);
    }
    if (!request_.rotary.defined()) return grad;
    return rotated(grad, request_.rotary.conj(), rows_of(key_rows_, 0, chunk.first_key, chunk.end_key));
  }

  /// Of rows from queries() and keys().
  Scores scores(const HeadInputs& inputs, const torch::Tensor& q, const torch::Tensor& k,
                const ScoreChunk& chunk) const {
    static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    Scores s;
    s.capped = inputs.terms.capped(unfolded(torch::matmul(q, k.transpose(-2, -1))));
    s.all = inputs.terms.added(s.capped, chunk);
    s.hidden = inputs.terms.hidden(chunk);
    if (request_.softcap <= 0) {
      s.capped.reset();
    } else if (s.all.is_same(s.capped)) {
      s.all = s.capped.clone();
    }
    if (inputs.bad_queries.defined()) {
      s.all.masked_fill_(rows_of(inputs.bad_queries, 2, chunk.first_query, chunk.end_query).unsqueeze(-1), kNaN);
    }
    if (inputs.bad_keys.defined()) {
      const torch::Tensor bad = rows_of(inputs.bad_keys, 2, chunk.first_key, chunk.end_key);
      s.all.masked_fill_(bad.repeat_interleave(request_.heads_per_kv_head(), 1).unsqueeze(-2), kNaN);
    }
    return s;
  }
  RunningSoftmax softmax(const HeadInputs& inputs, int64_t queries) const {
    return {{inputs.q.size(0), inputs.q.size(1), queries}, inputs.terms.sink, q_.options().dtype(dtype_)};
  }

  /// exp(scores - lse), 0 where hidden, in the memory of s.all.
  static torch::Tensor take_weights(Scores& s, const SplitLse& lse, const ScoreChunk& chunk) {
    const auto column = [&](const torch::Tensor& x) {
      return x.slice(2, chunk.first_query, chunk.end_query).unsqueeze(-1);
    };
    torch::Tensor weights = std::exchange(s.all, {}).sub_(column(lse.high)).sub_(column(lse.low)).exp_();
    if (s.hidden.defined()) weights.masked_fill_(s.hidden, 0);
    return weights;
  }
  /// Where a log-sum-exp is too coarse, replaces the two parts of these queries' `q` by the maximum and the logarithm
  /// of the sum, which takes another pass over their scores.
  void sharpen(const SplitLse& lse, const HeadInputs& inputs, const torch::Tensor& q,
               const std::pair<int64_t, int64_t>& queries) const {
    if (!lse.coarse) return;
    const auto [first, last] = queries;
    RunningSoftmax running = softmax(inputs, last - first);
    for_each_chunk(inputs, first, last, [&](const ScoreChunk& chunk) {
      Scores s = scores(inputs, q, keys(inputs, chunk), chunk);
      running.add(s.all, s.hidden);
    });
    const torch::Tensor empty = running.sum == 0;
    lse.high.slice(2, first, last).copy_(running.maximum.masked_fill(empty, 0).squeeze(-1));
    lse.low.slice(2, first, last).copy_(running.sum.masked_fill(empty, 1).log_().squeeze(-1));
  }

  static torch::Tensor rows_of(const torch::Tensor& x, int64_t dim, int64_t first, int64_t last) {
    return x.defined() ? x.slice(dim, first, last) : x;
  }

 private:
  HeadInputs inputs_of(const HeadRange& heads, const HeadRange& of_kv) const {
    return {part_of(q_, heads, 2),
            part_of(k_, of_kv, 2),
            part_of(v_, of_kv, 2),
            part_of(bad_queries_, heads, 1),
            part_of(bad_keys_, of_kv, 1),
            part_of(request_.polar_phase, of_kv, 1),
            terms_.of(heads)};
  }
  Turns turns_of_queries(int64_t first, int64_t last) const {
    return polar_turns(request_.polar, rows_of(query_rows_, 0, first, last), {}, dtype_);
  }
  Turns turns_of_keys(const HeadInputs& inputs, const ScoreChunk& chunk) const {
    return polar_turns(request_.polar, rows_of(key_rows_, 0, chunk.first_key, chunk.end_key), inputs.phase, dtype_);
  }
  torch::Tensor finite_queries(const HeadInputs& inputs, int64_t first, int64_t last) const {
    return without_rows(rows_of(inputs.q, 2, first, last).to(dtype_), rows_of(inputs.bad_queries, 2, first, last));
  }
  torch::Tensor finite_keys(const torch::Tensor& x, const HeadInputs& inputs, const ScoreChunk& chunk) const {
    return without_rows(rows_of(x, 2, chunk.first_key, chunk.end_key).to(dtype_),
                        rows_of(inputs.bad_keys, 2, chunk.first_key, chunk.end_key));
  }

  const torch::Tensor &q_, &k_, &v_;
  const AttentionRequest& request_;
  torch::ScalarType dtype_;
  ChunkSizes sizes_;
  ScoreTerms terms_;
  torch::Tensor bad_queries_, bad_keys_;  // rows that are not finite; undefined: none, or nothing is hidden
  torch::Tensor query_rows_, key_rows_;
};

}  // namespace headroom::inline v0::detail
