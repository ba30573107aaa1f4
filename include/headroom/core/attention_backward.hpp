#pragma once

#include <atomic>
#include <bit>
#include <memory>
#include <thread>
#include <vector>

#include "headroom/core/executor.hpp"
#include "headroom/core/pair_product.hpp"
#include "headroom/core/score_rules.hpp"

namespace headroom::inline v0::core {

/// Gradients of what AttentionParams adds to scores; one without data is not wanted. They are added to what is there.
/// `bias` has the shape [B,H,Lq,Lk] and stride 0 in dimensions where the bias is broadcast, whose sum it receives.
struct AttentionParamGradients {
  StoredTensor bias = {};
  TensorView<double> relative_bias = {};  // [1,H,1,2R-1], stride 0 between heads that share it
  TensorView<double> slopes = {};         // [B,H,Lq,1], stride 0 where broadcast
  TensorView<double> sink = {};           // [1,H,1,1]
};

namespace detail {

/// All tensors of one backward pass; shapes as in attention_backward.
template <class Scalar>
struct BackwardTensors : AttentionTensors {
  StoredTensor grad_output;
  TensorView<const double> grad_lse;
  StoredTensor grad_q, grad_k, grad_v;
  StoredTensor grad_bias;
};

/// What weights of queries are normalised by where their log-sum-exp is too large, or no number: the largest score of
/// each, and one over the sum of weights relative to it. Found from the scores once more, by the first group of keys.
template <class Scalar>
struct Normalisers {
  std::unique_ptr<Scalar[]> memory;  // only where it is needed, which is never planned for
  Index queries = 0;

  void allocate(Index count) {
    if (memory == nullptr) memory.reset(new Scalar[2 * count]);
    queries = count;
  }
  Scalar* maximum() const { return memory.get(); }
  Scalar* inverse() const { return memory.get() + queries; }
};

/// Heads of q that one task has to see together, because they share keys or add to the same gradient of a bias.
struct HeadFamily {
  Index first_batch, batches, first_head, heads;
  Index size() const { return batches * heads; }
  /// Calls f(b, h) for each, in order.
  template <class F>
  void for_each(F&& f) const {
    for (Index b = first_batch; b < first_batch + batches; ++b) {
      for (Index h = first_head; h < first_head + heads; ++h) f(b, h);
    }
  }
};

/// Backward of a few tiles of keys against all queries, one block of queries at a time. Keys fill the lanes; queries
/// and output gradients are read where they lie. With P = weights, dP = grad_output·vᵀ, delta =
/// sum(grad_output·output):
///   dS = P·(dP - delta),  grad_v = Pᵀ·grad_output,  grad_k = scale·dSᵀ·q,  grad_q = scale·dS·k.
///
/// Several groups add to the same rows of grad_q. They take turns, block by block and in ascending order, so that the
/// sums are the same bits for any number of workers and nobody needs an accumulator of his own.
///
/// bfloat16 is multiplied in pairs where the processor can: then P and dS are rounded to bfloat16, sums are not.
template <class Scalar>
class BackwardGroup {
 public:
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;
  static constexpr Index kQueries = 16 * kTileRows;                       // queries in a block: its weights stay in L1
  static constexpr Index kMostKeys = LaneGroups<Scalar>::kMost * kWidth;  // of a group

  /// What the groups of one head share.
  struct Head {
    Index b, h;
    const KeyRange* seen;     // [blocks of queries]: no key outside is seen by any query of the block
    Scalar* delta;            // [Lq], written by the first group
    std::uint16_t* grad_q;    // [Lq][D]: lower halves of the sums where grad_q is stored in 16 bits, else null
    std::atomic<int>* turns;  // [blocks of queries]: groups that are done with the block; null when groups run in order
    StoredMatrix grad_bias;   // [Lq, keys from the group's first one on], without data when not wanted
    double *bias_rows, *relative, *slopes, *sink;  // this worker's sums, null when not wanted
    Normalisers<Scalar>* normalisers;
  };

  BackwardGroup(std::byte* workspace, Index dim, Index value_dim, bool cap)
      : padded_dim_(padded(dim, N)), scratch_(workspace), dim_(dim), value_dim_(value_dim) {
    weights_ = scratch_.take<Scalar>(kQueries * kWidth);
    grad_scores_ = scratch_.take<Scalar>(kQueries * kWidth);
    cap_slope_ = scratch_.take<Scalar>(cap ? kQueries * kWidth : 0);
    buffer_ = scratch_.take<Scalar>(
        std::max(ScoreRules<Scalar>::buffer_size(kQueries, kWidth), 3 * N * std::max(dim, value_dim)));
    const Index tiles = LaneGroups<Scalar>::most(dim + value_dim);
    if (kPairs) {
      pair_dim_ = dim = padded(dim, kPairDepth), pair_value_dim_ = value_dim = padded(value_dim, kPairDepth);
      grad_score_rows_ = scratch_.take<Eigen::bfloat16>(kQueries * kPairWidth);
    }
    grad_queries_ = scratch_.take<Scalar>(kQueries * std::max(padded_dim_, std::max(dim, value_dim) / 2));
    queries_ = scratch_.take<Scalar>(kQueries * dim);
    grads_ = scratch_.take<Scalar>(kQueries * value_dim);
    for (Index t = 0; t < tiles; ++t) {
      Tile& tile = tiles_[t];
      tile.key = scratch_.take<Scalar>(dim * kWidth);
      tile.value = scratch_.take<Scalar>(value_dim * kWidth);
      tile.grad_key = scratch_.take<Scalar>(dim * kWidth);
      tile.grad_value = scratch_.take<Scalar>(value_dim * kWidth);
      tile.scaled_key = scratch_.take<Scalar>(kWidth * padded_dim_);
    }
    if (!cap) cap_slope_ = nullptr;
  }
  static Index workspace_bytes(Index dim, Index value_dim, bool cap) {
    return BackwardGroup(nullptr, dim, value_dim, cap).scratch_.bytes();
  }
  /// The keys of a group.
  static KeyRange keys(const BackwardTensors<Scalar>& x, Index group) {
    const LaneTiling<Scalar> tiling(x.k.length());
    const Index first = key_groups(x).first_tile(group), count = key_groups(x).tiles(group);
    if (count == 0) return {};
    const auto last = tiling[first + count - 1];
    return {tiling[first].begin, std::min(last.begin + last.width(), x.k.length())};
  }
  /// One group even without keys: it clears grad_q.
  static Index groups(const BackwardTensors<Scalar>& x) { return std::max<Index>(key_groups(x).count(), 1); }
  static Index blocks(Index queries) { return (queries + kQueries - 1) / kQueries; }
  /// Writes Head::seen of head (b,h).
  static void find_seen(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules, Index b, Index h,
                        KeyRange* seen) {
    Index begin[kQueries], end[kQueries];
    for (Index first = 0; first < x.q.length(); first += kQueries) {
      const Index count = std::min(kQueries, x.q.length() - first);
      rules.mask().ranges(b, h, {first, first + count}, x.k.length(), begin, end);
      *seen++ = hull(begin, end, count, x.k.length());
    }
  }

  /// Group `group` of the keys that the heads of a family use; `head(b, h)` gives their Head.
  template <class HeadOf>
  void run(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules, const HeadFamily& family, Index group,
           HeadOf&& head) {
    const Index share = x.heads() / x.k.shape[1];  // heads of q that use one head of k
    const Index key_batches = x.k.shape[0] == 1 && x.batch() > 1 ? family.batches : 1;
    for (Index b = 0; b < family.batches; b += key_batches) {
      for (Index h = 0; h < family.heads; h += share) {
        const HeadFamily members{family.first_batch + b, key_batches, family.first_head + h, share};
        run_shared_keys(x, rules, members, group, head);
      }
    }
  }

 private:
  using Packet = simd::Packet<Scalar>;
  using Run = QueryRun<Scalar, kQueries>;
  static LaneGroups<Scalar> key_groups(const BackwardTensors<Scalar>& x) {
    return {x.k.length(), x.batch() * x.heads(), x.k.dim() + x.v.dim()};
  }
  static constexpr Index N = simd::kLanes<Scalar>;
  static constexpr bool kPairs = kHasPairProducts && std::is_same_v<Scalar, float>;
  static constexpr Index kPairWidth = padded(kWidth, kPairDepth);

  struct Tile {
    Scalar *key, *value;  // [D][width], [Dv][width], or in pairs [padded D/2][width]; the sign of a negative scale is
                          // in the key, as in q forward
    Scalar *grad_key, *grad_value;  // [D][width] without the scale, [Dv][width]
    Scalar* scaled_key;  // [width][padded D]: scale·k, 0 where k is not finite; in pairs [width/2][padded D] of k
    KeyRange keys;
    int vectors;
    Index width() const { return vectors * N; }
    Pair* key_pairs() const { return reinterpret_cast<Pair*>(key); }
    Pair* value_pairs() const { return reinterpret_cast<Pair*>(value); }
    Pair* row_pairs() const { return reinterpret_cast<Pair*>(scaled_key); }
  };

  /// Queries of a block that see keys of a tile.
  struct Queries {
    const Run& run;
    MatrixView<const Scalar> q, g;
    MatrixView<const Scalar> finite_q, finite_g;  // what the sums over queries take
    const Scalar *delta, *lse, *lse_rest;
    const bool* apart;                // which queries have normalisers instead of lse, null if none has
    const Scalar *maximum, *inverse;  // normalisers
    Scalar* grad;                     // [rows][padded D]: sums for grad_q
    Index rows() const { return q.rows; }
  };

  // In pairs the memory of rows and weights is used like this:
  Eigen::bfloat16* query_rows() const { return reinterpret_cast<Eigen::bfloat16*>(queries_); }  // [queries][padded D]
  Eigen::bfloat16* query_columns() const { return query_rows() + kQueries * pair_dim_; }        // the transpose
  Eigen::bfloat16* grad_rows() const { return reinterpret_cast<Eigen::bfloat16*>(grads_); }
  Eigen::bfloat16* grad_columns() const { return grad_rows() + kQueries * pair_value_dim_; }
  Pair* words() const { return reinterpret_cast<Pair*>(grad_queries_); }    // while it holds no sums
  Pair* weight_pairs() const { return reinterpret_cast<Pair*>(weights_); }  // [queries/2][width]
  Pair* grad_score_pairs() const { return reinterpret_cast<Pair*>(grad_scores_); }

  /// Heads of q that use the same head of k.
  template <class HeadOf>
  void run_shared_keys(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules, const HeadFamily& members,
                       Index group, HeadOf&& head) {
    const LaneTiling<Scalar> tiling(x.k.length());
    const Index first_tile = key_groups(x).first_tile(group), count = key_groups(x).tiles(group);
    const Index b0 = members.first_batch, h0 = members.first_head;
    const auto turn = Rotation<Scalar>::of_keys(rules.params());
    const StoredMatrix keys = x.k.head(b0, h0, x.heads()), values = x.v.head(b0, h0, x.heads());
    KeyRange seen{x.k.length(), 0};
    members.for_each([&](Index b, Index h) {
      const KeyRange* const of_block = head(b, h).seen;
      for (Index block = 0; block < blocks(x.q.length()); ++block) seen = hull(seen, of_block[block]);
    });
    in_pairs_ = kPairs && multiplies_pairs(x, rules.params());
    std::optional<PairUnit> unit;
    if (in_pairs_) unit.emplace();
    for (Index t = 0; t < count; ++t) open(tiles_[t], tiling[first_tile + t], x, keys, values, seen, rules);
    members.for_each([&](Index b, Index h) { add_head(x, rules, head(b, h), group, count); });
    const RowWriter<Scalar> grad_k(x.grad_k.head(b0, h0, x.heads()), turn), grad_v(x.grad_v.head(b0, h0, x.heads()));
    for (Index t = 0; t < count; ++t) close(tiles_[t], grad_k, grad_v, rules.scale());
  }

  /// All queries of one head against the open tiles.
  void add_head(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules, const Head& head, Index group,
                Index count) {
    const auto [b, h, seen, delta, grad_q_halves, turns, grad_bias, bias_rows, relative, slopes, sink, normalisers] =
        head;
    const KeyRange keys = BackwardGroup::keys(x, group);
    const AttentionParams& params = rules.params();
    const auto turn = Rotation<Scalar>::of_queries(params);
    const Index queries = x.q.length();
    const RowReader<Scalar> q(x.q.head(b, h, x.heads()), turn), g(x.grad_output.head(b, h, x.heads())),
        o(x.output.head(b, h, x.heads()));
    const RowSums<Scalar> grad_q(x.grad_q.head(b, h, x.heads()), turn, grad_q_halves);
    const bool last_group = group + 1 == groups(x);

    for (Index block = 0; block < blocks(queries); ++block) {
      const Index first = block * kQueries, rows = std::min(kQueries, queries - first);
      if (turns != nullptr) {
        while (turns[block].load(std::memory_order_acquire) != group) std::this_thread::yield();
      }
      const KeyRange block_queries{first, first + rows};
      const bool apart = find_apart(x.lse, b, h, block_queries);
      if (group == 0) {
        write_delta(delta + first, g, o, first, rows);
        grad_q.clear(first, rows);
        if (apart) normalise(x, rules, head, block_queries);
        for (Index i = first; i < first + rows; ++i) {
          if (x.grad_lse.data != nullptr) delta[i] -= static_cast<Scalar>(x.grad_lse(b, h, i, 0));
          if (sink == nullptr) continue;
          const double weight = apart_[i - first] ? static_cast<double>(lse_rest_[i - first])
                                                  : std::exp2(*rules.sink(h) - x.lse(b, h, i, 0) * std::numbers::log2e);
          *sink -= weight * static_cast<double>(delta[i]);
        }
      }
      if (!(seen[block] & keys).empty() && (!rules.hides_elements() || rules.sees_any(b, h, block_queries, keys))) {
        const Run run(rules.mask(), params, b, h, block_queries, x.k.length());
        split_lse(x.lse, b, h, first, rows, static_cast<double>(rules.factor()));
        MatrixView<const Scalar> q_block{nullptr, rows}, g_block{nullptr, rows}, finite_q, finite_g;
        if (in_pairs_) {
          const Index depth = padded(rows, kPairDepth);
          copy_pair_rows(query_rows(), depth, pair_dim_, x.q.head(b, h, x.heads()), first, rows, 1);
          copy_pair_rows(grad_rows(), depth, pair_value_dim_, x.grad_output.head(b, h, x.heads()), first, rows, 1);
          transpose_pairs(query_columns(), kQueries, query_rows(), depth, pair_dim_, words());
          transpose_pairs(grad_columns(), kQueries, grad_rows(), depth, pair_value_dim_, words());
        } else {
          q_block = q.rows(first, rows, queries_), g_block = g.rows(first, rows, grads_);
        }
        const bool hides_some = hides(run, rules, keys);
        spoiled_ =
            hides_some && !(in_pairs_ ? pair_queries_are_finite(rows) : are_finite(q_block) && are_finite(g_block));
        finite_q = q_block, finite_g = g_block;
        if (spoiled_) take_out_not_finite(finite_q, finite_g);
        std::fill_n(grad_queries_, padded(rows, kPairRows) * padded_dim_, Scalar(0));
        for (Index t = 0; t < count; ++t) {
          const Tile& tile = tiles_[t];
          if (!run.touches(tile.keys)) continue;
          KeyRange seeing = run.that_see(tile.keys);
          if (seeing.empty()) continue;
          if (in_pairs_) seeing = run.queries;  // a sum over queries is padded with those that follow
          const bool all = seeing == run.queries;
          if (!all) part_ = run.part(seeing);
          const Index skip = seeing.begin - first, seen_by = seeing.end - seeing.begin;
          const Queries part{all ? run : part_,
                             q_block.middle_rows(skip, seen_by),
                             g_block.middle_rows(skip, seen_by),
                             finite_q.middle_rows(skip, seen_by),
                             finite_g.middle_rows(skip, seen_by),
                             delta + first + skip,
                             lse_ + skip,
                             lse_rest_ + skip,
                             apart ? apart_ + skip : nullptr,
                             apart ? normalisers->maximum() + first + skip : nullptr,
                             apart ? normalisers->inverse() + first + skip : nullptr,
                             grad_queries_ + skip * padded_dim_};
          const ScoreTile<Scalar> weights{weights_, tile.width(), b, h, tile.keys};
          with_count<kTileVectors>(tile.vectors, [&]<int Vectors> { weigh<Vectors>(tile, weights, part, rules); });
          if (grad_bias.data != nullptr || bias_rows != nullptr || relative != nullptr || slopes != nullptr) {
            const ScoreTile<Scalar> grad{grad_scores_, tile.width(), b, h, tile.keys};
            rules.add_gradients(grad, part.run, grad_bias, tile.keys.begin - keys.begin, bias_rows, relative, slopes,
                                buffer_);
          }
          if (cap_slope_ != nullptr) multiply_by_cap_slope(seen_by * tile.width());
          if (spoiled_) add_not_finite(tile, part);
          with_count<kTileVectors>(tile.vectors, [&]<int Vectors> { accumulate<Vectors>(tile, part); });
        }
        if (in_pairs_) {
          const Scalar scale = static_cast<Scalar>(rules.scale());
          for (Index i = 0; i < rows * padded_dim_; ++i) grad_queries_[i] *= scale;
        }
        grad_q.add(first, rows, grad_queries_, padded_dim_);
      }
      if (last_group) grad_q.finish(first, rows, buffer_);
      if (turns != nullptr) turns[block].store(static_cast<int>(group) + 1, std::memory_order_release);
    }
  }

  /// Keys that nobody sees are not read: whatever they hold, NaN included, stays out of every product.
  void open(Tile& tile, typename LaneTiling<Scalar>::Tile lanes, const BackwardTensors<Scalar>& x,
            const StoredMatrix& k_head, const StoredMatrix& v_head, KeyRange seen, const ScoreRules<Scalar>& rules) {
    const Index dim = x.k.dim(), value_dim = x.v.dim();
    tile.keys = {lanes.begin, std::min(lanes.begin + lanes.width(), x.k.length())};
    tile.vectors = lanes.vectors;
    const Index width = tile.width();
    const KeyRange read = tile.keys & seen;
    std::fill_n(tile.grad_key, (in_pairs_ ? pair_dim_ : dim) * width, Scalar(0));
    std::fill_n(tile.grad_value, (in_pairs_ ? pair_value_dim_ : value_dim) * width, Scalar(0));
    if (in_pairs_) return open_pairs(tile, k_head, v_head, read, rules);
    std::fill_n(tile.scaled_key, width * padded_dim_, Scalar(0));
    if (read.empty() || read.end - read.begin < width) {
      std::fill_n(tile.key, dim * width, Scalar(0));
      std::fill_n(tile.value, value_dim * width, Scalar(0));
    }
    if (read.empty()) return;
    const RowReader<Scalar> keys(k_head, Rotation<Scalar>::of_keys(rules.params())), values(v_head);
    const Index skip = read.begin - tile.keys.begin, count = read.end - read.begin;
    keys.pack(tile.key, width, skip, read.begin, count, Times<Scalar>{rules.sign()}, buffer_);
    values.pack(tile.value, width, skip, read.begin, count, Times<Scalar>{1}, buffer_);
    const Scalar scale = static_cast<Scalar>(rules.scale());
    for (Index i = 0; i < count; ++i) {
      const Scalar* const row = keys.rows(read.begin + i, 1, buffer_).data;
      Scalar* const scaled = tile.scaled_key + (skip + i) * padded_dim_;
      // A key that is not finite makes NaN of the gradients of all scores it is seen in; 0·NaN would do so elsewhere.
      for (Index d = 0; d < dim; ++d) scaled[d] = is_finite(row[d]) ? scale * row[d] : Scalar(0);
    }
  }

  /// The same in pairs.
  void open_pairs(Tile& tile, const StoredMatrix& keys, const StoredMatrix& values, KeyRange read,
                  const ScoreRules<Scalar>& rules) {
    const Index width = tile.width(), skip = std::max<Index>(read.begin - tile.keys.begin, 0),
                count = std::max<Index>(read.end - read.begin, 0), rows = padded(width, kPairDepth);
    Eigen::bfloat16 *const key_rows = query_rows(), *const value_rows = grad_rows();  // [rows][padded D], for now
    std::fill_n(key_rows, rows * pair_dim_, Eigen::bfloat16(0));
    std::fill_n(value_rows, rows * pair_value_dim_, Eigen::bfloat16(0));
    copy_pair_rows(key_rows + skip * pair_dim_, count, pair_dim_, keys, read.begin, count, 1);
    copy_pair_rows(value_rows + skip * pair_value_dim_, count, pair_value_dim_, values, read.begin, count, 1);
    Pair* const pairs = tile.row_pairs();
    for (Index j = 0; j < rows; j += 2) {
      for (Index d = 0; d < padded_dim_; ++d) {
        const auto bits = [&](Index row) -> Pair {  // 0·NaN, as above
          const auto half = Eigen::numext::bit_cast<std::uint16_t>(key_rows[row * pair_dim_ + d]);
          return (half & 0x7f80U) == 0x7f80U ? 0 : half;
        };
        pairs[j / 2 * padded_dim_ + d] = bits(j) | bits(j + 1) << 16;
      }
    }
    if (rules.sign() < 0) {
      for (Index i = 0; i < rows * pair_dim_; ++i) key_rows[i] = -key_rows[i];
    }
    pair_lanes(tile.key_pairs(), width, key_rows, width, pair_dim_);
    pair_lanes(tile.value_pairs(), width, value_rows, width, pair_value_dim_);
  }

  void close(const Tile& tile, const RowWriter<Scalar>& grad_k, const RowWriter<Scalar>& grad_v, double scale) {
    const Index first = tile.keys.begin, count = tile.keys.end - first;
    alignas(64) Scalar factor[kWidth];
    std::fill_n(factor, kWidth, static_cast<Scalar>(scale));
    grad_k.unpack(first, count, tile.grad_key, tile.width(), factor, buffer_);
    std::fill_n(factor, kWidth, Scalar(1));
    grad_v.unpack(first, count, tile.grad_value, tile.width(), factor, buffer_);
  }

  /// delta[i] = sum_d g(i,d)·o(i,d), added in the order in which weigh() adds dP: with one key the two are equal.
  void write_delta(Scalar* delta, const RowReader<Scalar>& g, const RowReader<Scalar>& o, Index first, Index count) {
    for (Index i = 0; i < count; i += N) {
      const Index rows = std::min(N, count - i), dim = g.cols();
      Scalar *const g_lanes = buffer_, *const o_lanes = g_lanes + N * dim, *const spare = o_lanes + N * dim;
      g.pack(g_lanes, N, 0, first + i, rows, Times<Scalar>{1}, spare);
      o.pack(o_lanes, N, 0, first + i, rows, Times<Scalar>{1}, spare);
      const Packet zero = simd::broadcast(Scalar(0));
      Packet sum = zero;
      for (Index d = 0; d < dim; ++d) {
        const Packet output = simd::load(o_lanes + d * N), more = simd::pmadd(simd::load(g_lanes + d * N), output, sum);
        sum = simd::pselect(simd::pcmp_eq(output, zero), sum, more);  // no NaN where a query sees no key
      }
      alignas(64) Scalar sums[N];
      simd::store(sums, sum);
      std::copy_n(sums, rows, delta + i);
    }
  }

  /// The lse as two numbers, because one float alone would lose too much. Where a product and a sum are rounded once,
  /// the nearest number in units of log2 and the rest. Else the score of weight 1, whose difference to the largest
  /// scores is exact, and what is left in units of log2.
  void split_lse(const TensorView<double>& lse, Index b, Index h, Index first, Index rows, double factor) {
    const double unit = simd::kFusedMultiplyAdd ? 1 : factor;
    const double* const from = &lse(b, h, first, 0);
    const Index stride = lse.strides[2];
    for (Index i = 0; i < rows; ++i) {
      const double base2 = from[i * stride] * std::numbers::log2e;
      const double whole =
          is_finite(base2) && !apart_[i] ? base2 : 0;  // a query without keys: all its scores are hidden
      lse_[i] = static_cast<Scalar>(whole / unit);
      lse_rest_[i] = static_cast<Scalar>(whole - static_cast<double>(lse_[i]) * unit);
    }
  }

  /// Whether any of these queries needs normalisers; apart_ says which: its lse is beyond kApart or NaN, but not that
  /// of one without keys.
  bool find_apart(const TensorView<double>& lse, Index b, Index h, KeyRange queries) {
    constexpr auto limit = std::bit_cast<std::uint64_t>(kApart<Scalar> * std::numbers::ln2),
                   nothing = std::bit_cast<std::uint64_t>(-std::numeric_limits<double>::infinity());
    const double* const from = &lse(b, h, queries.begin, 0);
    bool any = false;
    for (Index i = 0; i < queries.end - queries.begin; ++i) {
      const auto bits = std::bit_cast<std::uint64_t>(from[i * lse.strides[2]]);
      apart_[i] = (bits & ~(std::uint64_t(1) << 63)) > limit && bits != nothing;
      any |= apart_[i];
    }
    return any;
  }

  /// Writes the normalisers of a block of queries: goes over all keys, with the scores of weigh(). The weights of
  /// the sink come in lse_rest_.
  void normalise(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules, const Head& head,
                 KeyRange queries) {
    const Index first = queries.begin, rows = queries.end - first, length = x.k.length();
    head.normalisers->allocate(x.q.length());
    Scalar *const maximum = head.normalisers->maximum() + first, *const inverse = head.normalisers->inverse() + first;
    const AttentionParams& params = rules.params();
    const Run run(rules.mask(), params, head.b, head.h, queries, length);
    const StoredMatrix q = x.q.head(head.b, head.h, x.heads()), k = x.k.head(head.b, head.h, x.heads());
    const RowReader<Scalar> keys(k, Rotation<Scalar>::of_keys(params));
    MatrixView<const Scalar> q_block{nullptr, rows};
    if (in_pairs_) {
      copy_pair_rows(query_rows(), padded(rows, kPairDepth), pair_dim_, q, first, rows, 1);
    } else {
      q_block = RowReader<Scalar>(q, Rotation<Scalar>::of_queries(params)).rows(first, rows, queries_);
    }
    std::fill_n(maximum, rows, kLeast<Scalar>);
    double sum[kQueries] = {};
    const LaneTiling<Scalar> tiling(length);
    for (Index t = 0; t < tiling.tiles; ++t) {
      const auto lanes = tiling[t];
      const Index width = lanes.width(), end = std::min(lanes.begin + width, length);
      const KeyRange tile_keys{lanes.begin, end}, read = tile_keys & run.any;
      if (read.empty()) continue;
      const Index skip = read.begin - tile_keys.begin, count = read.end - read.begin;
      Scalar* const key_lanes = grad_queries_;  // holds no sums yet
      if (in_pairs_) {
        Eigen::bfloat16* const key_rows = query_columns();
        std::fill_n(key_rows, width * pair_dim_, Eigen::bfloat16(0));
        copy_pair_rows(key_rows + skip * pair_dim_, count, pair_dim_, k, read.begin, count,
                       static_cast<float>(rules.sign()));
        pair_lanes(reinterpret_cast<Pair*>(key_lanes), width, key_rows, width, pair_dim_);
      } else {
        std::fill_n(key_lanes, x.k.dim() * width, Scalar(0));
        keys.pack(key_lanes, width, skip, read.begin, count, Times<Scalar>{rules.sign()}, buffer_);
      }
      const ScoreTile<Scalar> scores{weights_, width, head.b, head.h, tile_keys};
      with_count<kTileVectors>(lanes.vectors, [&]<int Vectors> {
        score<Vectors>(key_lanes, scores, run, q_block, rules);
        for (Index i = 0; i < rows; ++i) add_to_normaliser<Vectors>(i, maximum[i], sum[i], rules.factor());
      });
    }
    const std::optional<double> sink = rules.sink(head.h);
    for (Index i = 0; i < rows; ++i) {
      const double of_sink =
          sink.has_value() ? std::exp2(rules.sink_above(head.h, static_cast<double>(maximum[i]))) : 0;
      const bool none = is_zero(sum[i]);
      inverse[i] = none ? Scalar(0) : static_cast<Scalar>(1 / (sum[i] + of_sink));
      lse_rest_[i] = none ? Scalar(1) : static_cast<Scalar>(1 / (1 + sum[i] / of_sink));
    }
  }

  /// Takes the scores of row i of a tile into its largest score and the sum of weights relative to it.
  template <int Vectors>
  void add_to_normaliser(Index row, Scalar& maximum, double& sum, Scalar factor) const {
    const Scalar* const s = weights_ + row * Vectors * N;
    Packet largest = simd::broadcast(maximum);
    for (int v = 0; v < Vectors; ++v) largest = simd::at_least(simd::load(s + v * N), largest);
    const Scalar before = maximum;
    maximum = Eigen::internal::predux_max(largest);
    const Packet reference = simd::broadcast(maximum), factors = simd::broadcast(factor);
    Packet weights = simd::broadcast(Scalar(0));
    for (int v = 0; v < Vectors; ++v) {
      weights =
          simd::padd(weights, simd::exp2<Scalar>(simd::pmul(simd::psub(simd::load(s + v * N), reference), factors)));
    }
    const double decay =
        std::exp2((static_cast<double>(before) - static_cast<double>(maximum)) * static_cast<double>(factor));
    sum = (is_zero(sum) ? 0 : sum * decay) + static_cast<double>(Eigen::internal::predux(weights));
  }

  /// forward did: weight = exp2((score - maximum)·factor) / sum
  EIGEN_ALWAYS_INLINE static Packet weight(Packet score, Packet factor, Packet lse, Packet rest) {
    if constexpr (simd::kFusedMultiplyAdd) {
      return simd::exp2<Scalar>(simd::pmadd(score, factor, simd::psub(simd::broadcast(Scalar(0)), lse)), rest);
    } else {
      return simd::exp2<Scalar>(simd::psub(simd::pmul(simd::psub(score, lse), factor), rest));
    }
  }

  static bool hides(const Run& run, const ScoreRules<Scalar>& rules, KeyRange keys) {
    return rules.hides_elements() || !run.covers(keys);
  }

  /// Scores of a block of queries and a tile of keys, the same bits wherever they are computed.
  template <int Vectors>
  EIGEN_DONT_INLINE void score(const Scalar* key_lanes, const ScoreTile<Scalar>& tile, const Run& run,
                               MatrixView<const Scalar> q, const ScoreRules<Scalar>& rules) {
    constexpr Index width = Vectors * N;
    Scalar* const scores = tile.scores;
    if constexpr (kPairs) {
      if (in_pairs_) {
        multiply_pairs<Vectors, false>(query_rows(), pair_dim_, reinterpret_cast<const Pair*>(key_lanes), width,
                                       padded(q.rows, kPairRows), pair_dim_ / 2, scores, width);
      }
    }
    for_row_tiles<kTileRows>(
        in_pairs_ ? 0 : q.rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> score(&q(row, 0), q.row_stride, 1, key_lanes, width, q.cols);
          score.for_each([&](int r, int v, Packet s)
                             __attribute__((always_inline)) { simd::store(scores + (row + r) * width + v * N, s); });
        });
    // also hidden: the lanes past the last key
    if (rules.scaled() || hides(run, rules, {tile.keys.begin, tile.keys.begin + width})) {
      rules.template apply<false>(tile, run, cap_slope_, buffer_);
    }
  }

  /// Scores of a query become weights.
  template <int Vectors>
  EIGEN_ALWAYS_INLINE static void weigh_row(Scalar* scores, Packet factor, Packet lse, Packet rest) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      simd::store(scores + v * N, weight(simd::load(scores + v * N), factor, lse, rest));
    }
  }
  /// The same where some queries of the block have normalisers.
  template <int Vectors>
  EIGEN_DONT_INLINE void weigh_apart(const Queries& queries, Packet factor) const {
    const Packet hidden = simd::broadcast(kHidden<Scalar>), zero = simd::broadcast(Scalar(0));
    for (Index row = 0; row < queries.rows(); ++row) {
      Scalar* const scores = weights_ + row * Vectors * N;
      if (!queries.apart[row]) {
        weigh_row<Vectors>(scores, factor, simd::broadcast(queries.lse[row]), simd::broadcast(queries.lse_rest[row]));
        continue;
      }
      const Packet maximum = simd::broadcast(queries.maximum[row]), inverse = simd::broadcast(queries.inverse[row]);
      for (int v = 0; v < Vectors; ++v) {
        const Packet s = simd::load(scores + v * N);
        const Packet weight = simd::pmul(simd::exp2<Scalar>(simd::pmul(simd::psub(s, maximum), factor)), inverse);
        simd::store(scores + v * N, simd::pselect(simd::pcmp_eq(s, hidden), zero, weight));
      }
    }
  }

  /// The product of x and something, 0 where x is: 0·NaN is NaN, and what is hidden has no gradient, whatever it holds.
  EIGEN_ALWAYS_INLINE static Packet unless_zero(Packet x, Packet product) {
    const Packet zero = simd::broadcast(Scalar(0));
    return simd::pselect(simd::pcmp_eq(x, zero), zero, product);
  }
  void multiply_by_cap_slope(Index count) {
    for (Index i = 0; i < count; i += N) {
      const Packet grad = simd::load(grad_scores_ + i);
      simd::store(grad_scores_ + i, unless_zero(grad, simd::pmul(grad, simd::load(cap_slope_ + i))));
    }
  }

  static bool are_finite(MatrixView<const Scalar> x) {
    bool finite = true;
    for (Index i = 0; i < x.rows && finite; ++i) finite = row_is_finite(&x(i, 0), x.cols);
    return finite;
  }
  bool pair_queries_are_finite(Index rows) const {
    return pairs_are_finite(query_rows(), rows * pair_dim_) && pairs_are_finite(grad_rows(), rows * pair_value_dim_);
  }
  /// Where a query or its gradient is not finite and does not see every key, what is not finite is taken out of the
  /// sums over queries, and add_not_finite() adds it for the keys that it does see. The copy is made only then.
  void take_out_not_finite(MatrixView<const Scalar>& q, MatrixView<const Scalar>& g) {
    if (in_pairs_) {
      const auto clear = [](Eigen::bfloat16* x, Index count) {
        for (Index i = 0; i < count; ++i) x[i] = pairs_are_finite(x + i, 1) ? x[i] : Eigen::bfloat16(0);
      };
      return clear(query_columns(), kQueries * pair_dim_), clear(grad_columns(), kQueries * pair_value_dim_);
    }
    finite_rows_.resize(q.rows * (q.cols + g.cols));
    Scalar* to = finite_rows_.data();
    for (MatrixView<const Scalar>* x : {&q, &g}) {
      const MatrixView<const Scalar> copy{to, x->rows, x->cols, x->cols, 1};
      for (Index i = 0; i < x->rows; ++i) {
        for (Index d = 0; d < x->cols; ++d) *to++ = is_finite((*x)(i, d)) ? (*x)(i, d) : Scalar(0);
      }
      *x = copy;
    }
  }
  void add_not_finite(const Tile& tile, const Queries& queries) const {
    const auto add = [&](Scalar* to, const Scalar* s, Index cols, auto&& element) {
      for (Index i = 0; i < queries.rows(); ++i) {
        for (Index d = 0; d < cols; ++d) {
          const Scalar x = element(i, d);
          for (Index l = 0; l < tile.width() && !is_finite(x); ++l) {
            const Scalar factor = s[i * tile.width() + l];
            if (!is_zero(factor)) to[d * tile.width() + l] += factor * x;
          }
        }
      }
    };
    add(tile.grad_key, grad_scores_, dim_, [&](Index i, Index d) {
      return in_pairs_ ? static_cast<Scalar>(query_rows()[i * pair_dim_ + d]) : queries.q(i, d);
    });
    add(tile.grad_value, weights_, value_dim_, [&](Index i, Index d) {
      return in_pairs_ ? static_cast<Scalar>(grad_rows()[i * pair_value_dim_ + d]) : queries.g(i, d);
    });
  }

  /// Weights of a block of queries and a tile of keys, and gradients of their scores.
  template <int Vectors>
  EIGEN_DONT_INLINE void weigh(const Tile& tile, const ScoreTile<Scalar>& tile_scores, const Queries& queries,
                               const ScoreRules<Scalar>& rules) {
    constexpr Index width = Vectors * N;
    const MatrixView<const Scalar> g = queries.g;
    const Scalar* const delta = queries.delta;
    const Index rows = queries.rows();
    Scalar *const weights = weights_, *const grad_scores = grad_scores_;  // [rows][width]
    const Packet factor = simd::broadcast(rules.factor());
    score<Vectors>(tile.key, tile_scores, queries.run, queries.q, rules);
    if constexpr (kPairs) {
      if (in_pairs_) {
        multiply_pairs<Vectors, false>(grad_rows(), pair_value_dim_, tile.value_pairs(), width, padded(rows, kPairRows),
                                       pair_value_dim_ / 2, grad_scores, width);
      }
    }
    const Index float_rows = in_pairs_ ? 0 : rows;
    if (queries.apart == nullptr) {
      const Scalar *const lse = queries.lse, *const rest = queries.lse_rest;
      for (Index row = 0; row < rows; ++row) {
        weigh_row<Vectors>(weights + row * width, factor, simd::broadcast(lse[row]), simd::broadcast(rest[row]));
      }
    } else {
      weigh_apart<Vectors>(queries, factor);
    }
    const bool drops = rules.params().dropout.active();
    for_row_tiles<kTileRows>(
        float_rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> grad(&g(row, 0), g.row_stride, 1, tile.value, width, g.cols);
          grad.for_each([&](int r, int v, Packet dp) __attribute__((always_inline)) {
            const Index at = (row + r) * width + v * N;
            simd::store(
                grad_scores + at,
                drops ? dp : simd::pmul(simd::load(weights + at), simd::psub(dp, simd::broadcast(delta[row + r]))));
          });
        });
    for (Index row = float_rows; row < rows && !drops; ++row) {  // in pairs
      for (Index at = row * width; at < (row + 1) * width; at += N) {
        const Packet dp = simd::load(grad_scores + at);
        simd::store(grad_scores + at,
                    simd::pmul(simd::load(weights + at), simd::psub(dp, simd::broadcast(delta[row]))));
      }
    }
    if (drops) {
      rules.drop_backward(tile_scores, queries.run.queries, grad_scores, delta);
    } else if (hides(queries.run, rules, {tile.keys.begin, tile.keys.begin + width})) {
      for (Index i = 0; i < rows * width; i += N) {
        simd::store(grad_scores + i, unless_zero(simd::load(weights + i), simd::load(grad_scores + i)));
      }
    }
  }

  /// Adds what a block of queries and a tile of keys contribute to the three gradients.
  template <int Vectors>
  EIGEN_DONT_INLINE void accumulate(const Tile& tile, const Queries& queries) {
    constexpr Index width = Vectors * N;
    // forward did: score(i,j) = sum_d q(i,d)·k(j,d) and output(i,d) = sum_j weight(i,j)·v(j,d)
    if constexpr (kPairs) {
      if (in_pairs_) return accumulate_pairs<Vectors>(tile, queries);
    }
    add_transposed<Vectors>(tile.grad_value, queries.finite_g, weights_);
    add_transposed<Vectors>(tile.grad_key, queries.finite_q, grad_scores_);
    for_row_tiles<kTileVectors>(
        padded_dim_ / N, [&]<int V>(Index vector) __attribute__((always_inline)) {
          for_row_tiles<kTileRows>(
              queries.rows(), [&]<int Rows>(Index row) __attribute__((always_inline)) {
                RegisterTile<Scalar, Rows, V> grad(grad_scores_ + row * width, width, 1, tile.scaled_key + vector * N,
                                                   padded_dim_, width);
                grad.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
                  Scalar* const to = queries.grad + (row + r) * padded_dim_ + (vector + v) * N;
                  simd::store(to, simd::padd(simd::load(to), x));
                });
              });
        });
  }

  /// The same in pairs.
  template <int Vectors>
  void accumulate_pairs(const Tile& tile, const Queries& queries) {
    constexpr Index width = Vectors * N, depth = padded(width, kPairDepth);
    const Index rows = queries.rows(), row_depth = padded(rows, kPairDepth);
    round_rows<Vectors>(grad_score_rows_, depth, grad_scores_, rows);
    pair_rows<Vectors>(weight_pairs(), weights_, 0, rows, row_depth);
    pair_rows<Vectors>(grad_score_pairs(), grad_scores_, 0, rows, row_depth);
    multiply_pairs<Vectors, true>(grad_columns(), kQueries, weight_pairs(), width, padded(value_dim_, kPairRows),
                                  row_depth / 2, tile.grad_value, width);
    multiply_pairs<Vectors, true>(query_columns(), kQueries, grad_score_pairs(), width, padded(dim_, kPairRows),
                                  row_depth / 2, tile.grad_key, width);
    for_row_tiles<kTileVectors>(padded_dim_ / N, [&]<int V>(Index vector) {
      multiply_pairs<V, true>(grad_score_rows_, depth, tile.row_pairs() + vector * N, padded_dim_,
                              padded(rows, kPairRows), depth / 2, grad_queries_ + vector * N, padded_dim_);
    });
  }

  /// to[d][lane] += sum_i x(i,d)·s[i][lane]
  template <int Vectors>
  EIGEN_ALWAYS_INLINE static void add_transposed(Scalar* to, MatrixView<const Scalar> x, const Scalar* s) {
    constexpr Index width = Vectors * N;
    for_row_tiles<kTileRows>(
        x.cols, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> sum(&x(0, d), 1, x.row_stride, s, width, x.rows);
          sum.for_each([&](int r, int v, Packet y) __attribute__((always_inline)) {
            Scalar* const at = to + (d + r) * width + v * N;
            simd::store(at, simd::padd(simd::load(at), y));
          });
        });
  }

  Index padded_dim_;
  Scratch scratch_;
  Scalar *weights_, *grad_scores_;  // [queries][width]
  Scalar* cap_slope_;               // [queries][width], null without a softcap
  Scalar* grad_queries_;            // [queries][padded D]
  Scalar *queries_, *grads_;        // [queries][D], [queries][Dv]: where they can't be read as they lie
  Scalar* buffer_;
  bool in_pairs_ = false;
  Index dim_, value_dim_, pair_dim_ = 0, pair_value_dim_ = 0;  // the latter padded
  Eigen::bfloat16* grad_score_rows_;                           // [queries][padded width]
  Tile tiles_[LaneGroups<Scalar>::kMost];
  Run part_;                         // of a block's queries, where some see no key of a tile
  bool apart_[kQueries];             // which queries of a block have normalisers
  bool spoiled_ = false;             // whether finite_q and finite_g of a block are not what they were made of
  std::vector<Scalar> finite_rows_;  // they, then
  alignas(64) Scalar lse_[kQueries], lse_rest_[kQueries];
};

/// The backward pass of all heads. Whole families of heads go to one worker each for as long as every worker gets one;
/// the groups of keys of the last few are split among all workers.
template <class Scalar, class E>
class BackwardPass {
  using Group = BackwardGroup<Scalar>;

 public:
  BackwardPass(const BackwardTensors<Scalar>& x, const ScoreRules<Scalar>& rules,
               const TensorView<double>& relative_bias, const TensorView<double>& slopes,
               const TensorView<double>& sink)
      : x_(x), rules_(rules), relative_bias_(relative_bias), slopes_(slopes), sink_(sink) {
    const StoredTensor& bias_grad = x.grad_bias;
    const bool bias(bias_grad), by_rows = bias && bias_grad.strides[3] == 0;
    const Index batch = x.batch(), heads = x.heads(), share = heads / std::max<Index>(x.k.shape[1], 1);
    const bool one_batch = x.k.shape[0] == 1 || (bias && !by_rows && bias_grad.strides[0] == 0);
    const bool one_head = bias && !by_rows && bias_grad.strides[1] == 0;
    batches_ = one_batch ? batch : 1;
    heads_ = one_head ? heads : share;
    families_ = batch * heads == 0 ? 0 : batch * heads / (batches_ * heads_);
    members_ = batches_ * heads_;
    groups_ = Group::groups(x);
    blocks_ = Group::blocks(x.q.length());
    bias_rows_ = by_rows ? x.q.length() : 0;
    if (bias && !by_rows && bias_grad.type != kStoredType<Scalar>) {
      const std::array<Index, 3> extents{batches_, heads_, x.q.length()};
      bool shared = false;
      for (int d = 0; d < 3; ++d) {
        shared |= bias_grad.strides[d] == 0 && extents[d] > 1;
        bias_sums_shape_[d] = bias_grad.strides[d] == 0 ? 1 : extents[d];
      }
      if (shared) bias_sums_shape_[3] = Group::kMostKeys;
    }
  }

  void run(const E& executor) {
    if (families_ * members_ == 0) return;
    const Index workers = executor.workers(), whole = families_ / workers * workers, split = families_ - whole;
    const bool cap = rules_.params().softcap > 0;
    const Index group_bytes = Group::workspace_bytes(x_.q.dim(), x_.v.dim(), cap);
    const Index head_bytes = HeadPart(nullptr, *this).bytes(), sum_bytes = SumPart(nullptr, *this).bytes();
    const Index bias_bytes = BiasSums(nullptr, *this).bytes();
    const Index head_parts = ((whole > 0 ? workers : 0) + split) * members_;
    const auto workspace =
        executor.allocate(workers * (group_bytes + bias_bytes + members_ * sum_bytes) + head_parts * head_bytes);
    std::byte* const bias_start = workspace.data() + workers * group_bytes;
    std::byte* const sums = bias_start + workers * bias_bytes;
    std::byte* const head_start = sums + workers * members_ * sum_bytes;
    for (Index i = 0; i < head_parts; ++i) {
      const HeadPart part(head_start + i * head_bytes, *this);
      for (Index block = 0; block < blocks_; ++block) new (part.turns + block) std::atomic<int>(0);
      part.totals.clear();
    }
    std::atomic<Index> committed{0};
    std::vector<Normalisers<Scalar>> normalisers(((whole > 0 ? workers : 0) + split) * members_);

    const auto family_at = [&](Index index) {
      const Index per_batch = x_.heads() / heads_;  // families in one batch
      return HeadFamily{index / per_batch * batches_, batches_, index % per_batch * heads_, heads_};
    };
    // Whole families use the parts of their worker, split ones their own
    const auto split_owner = [&](Index s) { return (whole > 0 ? workers : 0) + s; };
    const auto head_part = [&](Index owner, Index member) {
      return HeadPart(head_start + (owner * members_ + member) * head_bytes, *this);
    };
    const auto find_seen = [&](const HeadFamily& family, Index owner) {
      Index member = 0;
      family.for_each([&](Index b, Index h) { Group::find_seen(x_, rules_, b, h, head_part(owner, member++).seen); });
    };
    executor.run(split, [&](Index s, int) { find_seen(family_at(whole + s), split_owner(s)); });
    executor.run(whole + split * groups_, [&](Index task, int worker) {
      Group group(workspace.data() + worker * group_bytes, x_.q.dim(), x_.v.dim(), cap);
      const bool is_whole = task < whole;
      const Index s = (task - whole) % std::max<Index>(split, 1);
      const HeadFamily family = family_at(is_whole ? task : whole + s);
      const Index owner = is_whole ? worker : split_owner(s);
      const auto slot = [&](Index b, Index h) { return (b - family.first_batch) * heads_ + h - family.first_head; };
      const auto sum_part = [&](Index member) {
        return SumPart(sums + (worker * members_ + member) * sum_bytes, *this);
      };
      const BiasSums bias_sums(bias_start + worker * bias_bytes, *this);
      const auto head = [&](Index b, Index h, KeyRange keys) {
        const HeadPart part = head_part(owner, slot(b, h));
        const SumPart sum = sum_part(slot(b, h));
        return typename Group::Head{b,
                                    h,
                                    part.seen,
                                    part.delta,
                                    part.grad_q,
                                    is_whole ? nullptr : part.turns,
                                    bias_gradient(bias_sums, family, b, h, keys),
                                    sum.bias_rows,
                                    sum.relative,
                                    sum.slopes,
                                    sum.sink,
                                    &normalisers[owner * members_ + slot(b, h)]};
      };
      const auto each_member = [&](auto&& f) {
        if (sum_bytes == 0) return;
        family.for_each([&](Index b, Index h) { f(sum_part(slot(b, h)), head_part(owner, slot(b, h)).totals, b, h); });
      };
      const auto run_group = [&](Index g) {
        const KeyRange keys = Group::keys(x_, g);
        each_member([](const SumPart& sum, const SumPart&, Index, Index) { sum.clear(); });
        bias_sums.clear();
        group.run(x_, rules_, family, g, [&](Index b, Index h) { return head(b, h, keys); });
        if (bias_sums) add_bias(bias_sums, family, keys);
      };
      const auto add_group = [&](Index g) {
        each_member([&](const SumPart& sum, const SumPart& total, Index b, Index h) {
          total.add(sum);
          if (g + 1 == groups_) commit(total, b, h);
          if (g + 1 == groups_) total.clear();
        });
      };
      // Sums of groups are added to those of their head and these to the results, always in the same order: the same
      // bits for any number of workers.
      const auto in_order = [&](auto&& f) {
        if (sum_bytes == 0) return;
        while (committed.load(std::memory_order_acquire) != task) std::this_thread::yield();
        f();
        committed.store(task + 1, std::memory_order_release);
      };
      if (is_whole) {
        find_seen(family, owner);
        for (Index g = 0; g < groups_; ++g) {
          run_group(g);
          if (g + 1 < groups_) add_group(g);
        }
        in_order([&] { add_group(groups_ - 1); });
      } else {
        const Index g = (task - whole) / split;
        run_group(g);
        in_order([&] { add_group(g); });
      }
    });
  }

 private:
  /// Sums for a head: of one group of keys, or of all.
  struct SumPart {
    double *bias_rows, *relative, *slopes, *sink;
    double* start;
    Scratch scratch;

    SumPart(std::byte* at, const BackwardPass& pass) : start(reinterpret_cast<double*>(at)), scratch(at) {
      const auto take = [&](bool wanted, Index count) { return wanted ? scratch.take<double>(count) : nullptr; };
      bias_rows = take(pass.bias_rows_ > 0, pass.bias_rows_);
      relative = take(pass.relative_bias_.data != nullptr, pass.relative_bias_.dim());
      slopes = take(pass.slopes_.data != nullptr, pass.x_.q.length());
      sink = take(pass.sink_.data != nullptr, 1);
    }
    Index bytes() const { return scratch.bytes(); }
    void clear() const { std::fill_n(start, bytes() / static_cast<Index>(sizeof(double)), 0.0); }
    void add(const SumPart& other) const {
      for (Index i = 0; i < bytes() / static_cast<Index>(sizeof(double)); ++i) start[i] += other.start[i];
    }
  };
  /// What the groups of a head share.
  struct HeadPart {
    KeyRange* seen;
    Scalar* delta;
    std::uint16_t* grad_q;
    std::atomic<int>* turns;
    Scratch scratch;
    SumPart totals;

    HeadPart(std::byte* start, const BackwardPass& pass) : scratch(start), totals(start, pass) {
      scratch.take<std::byte>(totals.bytes());
      seen = scratch.take<KeyRange>(pass.blocks_);
      delta = scratch.take<Scalar>(pass.x_.q.length());
      turns = scratch.take<std::atomic<int>>(pass.blocks_);
      const bool splits = RowSums<Scalar>::splits(pass.x_.grad_q.type);
      grad_q = splits ? scratch.take<std::uint16_t>(pass.x_.q.length() * pass.x_.q.dim()) : nullptr;
    }
    Index bytes() const { return scratch.bytes(); }
  };
  /// Sums of one group of keys for the gradient of a bias that several heads or queries share and that is stored in
  /// fewer bits than it is computed in, so that it is rounded once: [B or 1,H or 1,Lq or 1,keys] of a family.
  struct BiasSums {
    Scalar* data;
    std::array<Index, 4> shape;

    BiasSums(std::byte* at, const BackwardPass& pass)
        : data(reinterpret_cast<Scalar*>(at)), shape(pass.bias_sums_shape_) {}
    Index size() const { return shape[0] * shape[1] * shape[2] * shape[3]; }
    Index bytes() const {
      Scratch scratch(nullptr);
      scratch.take<Scalar>(size());
      return scratch.bytes();
    }
    explicit operator bool() const { return size() > 0; }
    void clear() const { std::fill_n(data, size(), Scalar(0)); }
    StoredMatrix head(Index b, Index h) const {
      const Index at = (std::min(b, shape[0] - 1) * shape[1] + std::min(h, shape[1] - 1)) * shape[2] * shape[3];
      return {data + at, kStoredType<Scalar>, shape[2], shape[3], shape[2] == 1 ? 0 : shape[3], 1};
    }
  };
  /// Where head (b,h) adds the gradient of its bias, from the first of `keys` on.
  StoredMatrix bias_gradient(const BiasSums& sums, const HeadFamily& family, Index b, Index h, KeyRange keys) const {
    if (!x_.grad_bias || bias_rows_ > 0) return {};
    if (sums) return sums.head(b - family.first_batch, h - family.first_head);
    return x_.grad_bias.head(b, h, x_.heads()).block(0, keys.begin, x_.q.length(), keys.end - keys.begin);
  }
  void add_bias(const BiasSums& sums, const HeadFamily& family, KeyRange keys) const {
    for (Index b = 0; b < sums.shape[0]; ++b) {
      for (Index h = 0; h < sums.shape[1]; ++h) {
        const auto from = sums.head(b, h).template as<Scalar>();
        x_.grad_bias.head(family.first_batch + b, family.first_head + h, x_.heads()).visit([&](auto to) {
          for (Index i = 0; i < sums.shape[2]; ++i) {
            add_strided(&to(i, keys.begin), to.col_stride, &from(i, 0), keys.end - keys.begin);
          }
        });
      }
    }
  }
  void commit(const SumPart& sum, Index b, Index h) const {
    if (sum.relative != nullptr) {
      for (Index r = 0; r < relative_bias_.dim(); ++r) relative_bias_(0, h, 0, r) += sum.relative[r];
    }
    if (sum.sink != nullptr) sink_(0, h, 0, 0) += *sum.sink;
    for (Index i = 0; i < x_.q.length(); ++i) {
      if (sum.slopes != nullptr) slopes_(b, h, i, 0) += sum.slopes[i];
    }
    if (sum.bias_rows == nullptr) return;
    x_.grad_bias.head(b, h, x_.heads()).visit([&](auto bias) {
      add_strided(bias.data, bias.row_stride, sum.bias_rows, x_.q.length());
    });
  }

  const BackwardTensors<Scalar>& x_;
  const ScoreRules<Scalar>& rules_;
  TensorView<double> relative_bias_, slopes_, sink_;
  Index batches_, heads_, families_, members_, groups_, blocks_, bias_rows_;
  std::array<Index, 4> bias_sums_shape_{};  // no elements: they are added up where they belong
};

}  // namespace detail

/// Gradients of attention_forward with respect to q, k and v (and, where wanted, to what AttentionParams adds to
/// scores), given the gradient of its output and, unless it is a null view, of its lse. `output` and `lse` are what the
/// forward pass wrote; weights are recomputed tile by tile. grad_q, grad_k and grad_v are overwritten and have the
/// shapes of q, k and v, any strides, and must not overlap with each other or with the inputs. Queries without keys and
/// keys without queries get gradient 0.
/// Workspace: BackwardGroup::workspace_bytes(D, Dv) and delta [Lq] a worker; where grad_q is stored in 16 bits also
/// [Lq][D] of those; for gradients of relative bias, slopes and of a bias that is broadcast along the keys also their
/// length, of a bias that is stored in 16 bits and broadcast otherwise [Lq][192]. Results are bit-equal for any number
/// of workers. Throws headroom.core.attention.{shape,scale,dropout,length,output}.
template <Storable T, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_backward(std::type_identity_t<TensorView<const T>> grad_output,
                        std::type_identity_t<TensorView<const T>> q, std::type_identity_t<TensorView<const T>> k,
                        std::type_identity_t<TensorView<const T>> v, std::type_identity_t<TensorView<const T>> output,
                        TensorView<const double> lse, TensorView<T> grad_q, TensorView<T> grad_k, TensorView<T> grad_v,
                        const AttentionParams& params = {}, const M& mask = {}, const E& executor = {},
                        const AttentionParamGradients& param_grads = {}, TensorView<const double> grad_lse = {}) {
  using Scalar = ComputeType<T>;
  const TensorView<double> saved_lse{const_cast<double*>(lse.data), lse.shape, lse.strides};
  const detail::BackwardTensors<Scalar> x{
      {q, k, v, output, saved_lse}, grad_output, grad_lse, grad_q, grad_k, grad_v, param_grads.bias};
  detail::check_shapes(x, params);
  require((lse.data != nullptr || q.shape[0] * q.shape[1] * q.shape[2] == 0) && grad_output.shape == output.shape &&
              grad_q.shape == q.shape && grad_k.shape == k.shape && grad_v.shape == v.shape,
          "headroom.core.attention.shape", "grad_output ", Shape{grad_output.shape}, ", grad_q ", Shape{grad_q.shape},
          ", grad_k ", Shape{grad_k.shape}, " and grad_v ", Shape{grad_v.shape}, " must have the shapes of the output ",
          Shape{output.shape}, ", q ", Shape{q.shape}, ", k ", Shape{k.shape}, " and v ", Shape{v.shape},
          ", and lse must be given");
  detail::check_writable("grad_q", grad_q);
  detail::check_writable("grad_k", grad_k);
  detail::check_writable("grad_v", grad_v);
  const detail::ScoreRules<Scalar> rules(params, detail::MaskRef(mask), x);
  detail::BackwardPass<Scalar, E>(x, rules, param_grads.relative_bias, param_grads.slopes, param_grads.sink)
      .run(executor);
}

}  // namespace headroom::inline v0::core
