#pragma once

#include "headroom/core/executor.hpp"
#include "headroom/core/pair_product.hpp"
#include "headroom/core/score_rules.hpp"

namespace headroom::inline v0::core {
namespace detail {

/// Forward of a few tiles of queries against all keys, one block of keys at a time (streaming softmax, Milakov &
/// Gimelshein 2018; Dao et al. 2022). Queries fill the lanes; keys and values are read where they lie. bfloat16 is
/// multiplied in pairs where the processor can: then weights are rounded to bfloat16, sums are not.
template <class Scalar>
class ForwardGroup {
 public:
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;
  static constexpr Index kKeys = 16 * kTileRows;  // keys in a block: its scores stay in L1

  ForwardGroup(std::byte* workspace, Index dim, Index value_dim) : scratch_(workspace) {
    scores_ = scratch_.take<Scalar>(kKeys * kWidth);
    keys_ = scratch_.take<Scalar>(kKeys * dim);
    values_ = scratch_.take<Scalar>(kKeys * value_dim);
    finite_values_ = scratch_.take<Scalar>(kKeys * value_dim);
    buffer_ =
        scratch_.take<Scalar>(std::max(ScoreRules<Scalar>::buffer_size(kKeys, kWidth), N * std::max(dim, value_dim)));
    const Index tiles = LaneGroups<Scalar>::most(dim + value_dim);
    if (kPairs) {
      dim = padded(dim, kPairDepth), value_dim = padded(value_dim, kPairDepth);
      key_rows_ = scratch_.take<Eigen::bfloat16>(kKeyRows * dim);
      value_rows_ = scratch_.take<Eigen::bfloat16>(kValueRows * value_dim);
      value_columns_ = scratch_.take<Eigen::bfloat16>(value_dim * kValueRows);
      words_ = scratch_.take<Pair>(value_dim / 2 * kValueRows);
      weight_pairs_ = scratch_.take<Pair>(kKeys / 2 * kWidth);
    }
    for (Index t = 0; t < tiles; ++t) {
      Tile& tile = tiles_[t];
      tile.query = scratch_.take<Scalar>(dim * kWidth);
      tile.output = scratch_.take<Scalar>(value_dim * kWidth);
      tile.maximum = scratch_.take<Scalar>(kWidth);
      tile.sum = scratch_.take<Scalar>(kWidth);
    }
  }
  static Index workspace_bytes(Index dim, Index value_dim) {
    return ForwardGroup(nullptr, dim, value_dim).scratch_.bytes();
  }

  /// Computes the rows of head (b,h) that `count` tiles from `first_tile` on hold.
  void run(const AttentionTensors& x, const ScoreRules<Scalar>& rules, Index b, Index h, Index first_tile,
           Index count) {
    const LaneTiling<Scalar> tiling(x.q.length());
    const Index length = x.k.length();
    const AttentionParams& params = rules.params();
    const StoredMatrix q_head = x.q.head(b, h, x.heads()), k_head = x.k.head(b, h, x.heads()),
                       v_head = x.v.head(b, h, x.heads());
    const RowReader<Scalar> queries(q_head, Rotation<Scalar>::of_queries(params)),
        keys(k_head, Rotation<Scalar>::of_keys(params)), values(v_head);
    in_pairs_ = kPairs && multiplies_pairs(x, params);
    std::optional<PairUnit> unit;
    if (in_pairs_) unit.emplace();
    pair_dim_ = padded(x.q.dim(), kPairDepth), pair_value_dim_ = padded(x.v.dim(), kPairDepth);
    output_rows_ = in_pairs_ ? padded(x.v.dim(), kPairRows) : x.v.dim();

    KeyRange needed{length, 0};
    for (Index t = 0; t < count; ++t) {
      Tile& tile = tiles_[t];
      const auto lanes = tiling[first_tile + t];
      const Index rows = std::min(lanes.width(), x.q.length() - lanes.begin), width = lanes.width();
      tile.vectors = lanes.vectors;
      tile.run = Run(rules.mask(), params, b, h, {lanes.begin, lanes.begin + rows}, length);
      if (in_pairs_) {
        copy_pair_rows(key_rows_, width, pair_dim_, q_head, lanes.begin, rows, static_cast<float>(rules.sign()));
        pair_lanes(tile.query_pairs(), width, key_rows_, width, pair_dim_);
      } else {
        if (rows < width) std::fill_n(tile.query, x.q.dim() * width, Scalar(0));
        queries.pack(tile.query, width, 0, lanes.begin, rows, Times<Scalar>{rules.sign()}, buffer_);
      }
      std::fill_n(tile.output, output_rows_ * width, Scalar(0));
      std::fill_n(tile.sum, width, Scalar(0));
      std::fill_n(tile.maximum, width, kLeast<Scalar>);  // above every hidden score, below no other
      needed = hull(needed, tile.run.any);
    }
    for (Index key = needed.begin; key < needed.end; key += kKeys) {
      const KeyRange block{key, std::min(key + kKeys, needed.end)};
      MatrixView<const Scalar> k_block, v_block;
      bool loaded = false;
      for (Index t = 0; t < count; ++t) {
        const Tile& tile = tiles_[t];
        const KeyRange part = tile.run.any & block;
        if (part.empty() || (rules.hides_elements() && !rules.sees_any(b, h, tile.run.queries, part))) continue;
        if (!loaded) {  // the first tile that needs them
          loaded = true;
          const Index block_keys = block.end - block.begin;
          if (in_pairs_) load_pairs(k_head, v_head, block.begin, block_keys);
          if (!in_pairs_) k_block = keys.rows(block.begin, block_keys, keys_);
          if (!in_pairs_ || !values_in_pairs_) v_block = values.rows(block.begin, block_keys, values_);
        }
        first_key_ = part.begin - block.begin;
        const Index rows = part.end - part.begin;
        const ScoreTile<Scalar> scores{scores_, tile.width(), b, h, part};
        attend(tile, scores, k_block.middle_rows(first_key_, rows), v_block.middle_rows(first_key_, rows), rules);
      }
    }
    for (Index t = 0; t < count; ++t) finish(tiles_[t], x, rules, b, h);
  }

 private:
  using Packet = simd::Packet<Scalar>;
  using Run = QueryRun<Scalar, kWidth>;
  static constexpr Index N = simd::kLanes<Scalar>;
  static constexpr bool kPairs = kHasPairProducts && std::is_same_v<Scalar, float>;
  static constexpr Index kKeyRows = kKeys + kPairRows, kValueRows = kKeys + kPairDepth;  // a block and zeros behind it

  struct Tile {
    Scalar* query;    // [D][width], or in pairs [padded D/2][width]
    Scalar* output;   // [Dv][width]: sum of weights times values
    Scalar* maximum;  // [width]: largest score so far
    Scalar* sum;      // [width]: sum of weights
    Run run;
    int vectors;
    Index width() const { return vectors * N; }
    Pair* query_pairs() const { return reinterpret_cast<Pair*>(query); }
  };

  /// Brings a block of keys and values into the form in which pairs are multiplied.
  void load_pairs(const StoredMatrix& keys, const StoredMatrix& values, Index first, Index count) {
    const Index value_rows = padded(count, kPairRows) + kPairDepth;
    copy_pair_rows(key_rows_, count + kPairRows, pair_dim_, keys, first, count, 1);
    copy_pair_rows(value_rows_, value_rows, pair_value_dim_, values, first, count, 1);
    values_in_pairs_ = pairs_are_finite(value_rows_, count * pair_value_dim_);
    if (values_in_pairs_) transpose_pairs(value_columns_, kValueRows, value_rows_, value_rows, pair_value_dim_, words_);
  }

  void attend(const Tile& tile, const ScoreTile<Scalar>& scores, MatrixView<const Scalar> keys,
              MatrixView<const Scalar> values, const ScoreRules<Scalar>& rules) {
    if (tile.vectors == kTileVectors && in_pairs_) {
      attend<kTileVectors, Eigen::Dynamic>(tile, scores, keys, values, rules);
    } else if (tile.vectors == kTileVectors) {
      with_head_dim<Scalar>(keys.cols, values.cols,
                            [&]<int HeadDim> { attend<kTileVectors, HeadDim>(tile, scores, keys, values, rules); });
    } else {
      with_count<kTileVectors - 1>(
          tile.vectors, [&]<int Vectors> { attend<Vectors, Eigen::Dynamic>(tile, scores, keys, values, rules); });
    }
  }

  /// Adds a block of keys to a tile: scores, weights relative to the running maximum, weighted sum of values.
  template <int Vectors, int HeadDim>
  EIGEN_DONT_INLINE void attend(const Tile& tile, const ScoreTile<Scalar>& scores, MatrixView<const Scalar> keys,
                                MatrixView<const Scalar> values, const ScoreRules<Scalar>& rules) {
    constexpr Index width = Vectors * N;
    const Index dim = HeadDim == Eigen::Dynamic ? keys.cols : HeadDim;
    const Index value_dim = HeadDim == Eigen::Dynamic ? values.cols : HeadDim;
    const Index count = scores.keys.end - scores.keys.begin;
    const bool in_pairs = kPairs && HeadDim == Eigen::Dynamic && in_pairs_;
    const bool hides = rules.hides_elements() || !tile.run.covers(scores.keys);
    const bool by_tile = rules.scaled() || rules.hides_elements() || (in_pairs && hides);  // scores change afterwards
    Scalar* const weights = scores.scores;                                                 // [keys][width]

    Packet before[Vectors], maximum[Vectors];
    for (int v = 0; v < Vectors; ++v) before[v] = maximum[v] = simd::load(tile.maximum + v * N);
    if constexpr (kPairs) {
      if (in_pairs) {
        multiply_pairs<Vectors, false>(key_rows_ + first_key_ * pair_dim_, pair_dim_, tile.query_pairs(), width,
                                       padded(count, kPairRows), pair_dim_ / 2, weights, width);
      }
    }
    const auto score_keys = [&]<bool Hides>(KeyRange part) __attribute__((always_inline)) {
      for_row_tiles<kTileRows>(
          part.end - part.begin, [&]<int Rows>(Index row) __attribute__((always_inline)) {
            const Index key = part.begin + row;
            rules.prefetch(scores, tile.run, key);
            RegisterTile<Scalar, Rows, Vectors> score(&keys(key, 0), keys.row_stride, 1, tile.query, width, dim);
            score.for_each([&](int r, int v, Packet s) __attribute__((always_inline)) {
              if constexpr (Hides) s = tile.run.hide_outside(scores.keys.begin + key + r, v * N, s);
              maximum[v] = simd::pmax(s, maximum[v]);
              simd::store(weights + (key + r) * width + v * N, s);
            });
          });
    };
    if (!in_pairs) {
      const KeyRange all{0, count}, plain = by_tile ? all : tile.run.inside(scores.keys);
      score_keys.template operator()<false>(plain);
      for (const KeyRange part : {KeyRange{0, plain.begin}, KeyRange{plain.end, count}}) {
        if (!part.empty()) score_keys.template operator()<true>(part);
      }
    }
    if (by_tile) [[unlikely]]
      rules.template apply<true>(scores, tile.run, nullptr, buffer_);
    if (by_tile || in_pairs) {
      for (int v = 0; v < Vectors; ++v) maximum[v] = before[v];
      for (Index key = 0; key < count; ++key) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          maximum[v] = simd::pmax(simd::load(weights + key * width + v * N), maximum[v]);
        }
      }
    }

    const Packet factor = simd::broadcast(rules.factor());
    Packet decay[Vectors], sum[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      decay[v] = simd::exp2<Scalar>(simd::pmul(simd::psub(before[v], maximum[v]), factor));
      sum[v] = simd::broadcast(Scalar(0));
      simd::store(tile.maximum + v * N, maximum[v]);
    }
    const auto weigh = [&](Index key, int v) __attribute__((always_inline)) {
      const Packet s = simd::load(weights + key * width + v * N);
      const Packet weight = simd::exp2<Scalar>(simd::pmul(simd::psub(s, maximum[v]), factor));
      sum[v] = simd::padd(sum[v], weight);
      return weight;
    };
    const bool drops = rules.params().dropout.active(), writes_pairs = in_pairs && values_in_pairs_ && !drops;
    Index key = 0;
    if constexpr (kPairs) {
      for (; writes_pairs && key + 2 <= count; key += 2) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const Packet even = weigh(key, v), odd = weigh(key + 1, v);
          store_pairs(weight_pairs_ + key / 2 * width + v * N, even, odd);
        }
      }
    }
    const Index paired = key;
    for (; key < count; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) simd::store(weights + key * width + v * N, weigh(key, v));
    }
    for (int v = 0; v < Vectors; ++v) {
      simd::store(tile.sum + v * N, simd::pmadd(simd::load(tile.sum + v * N), decay[v], sum[v]));
    }
    if (drops) rules.drop(scores, tile.run);
    if constexpr (kPairs) {
      if (in_pairs && values_in_pairs_) {
        pair_rows<Vectors>(weight_pairs_, weights, paired, count, padded(count, kPairDepth));
        return add_values_in_pairs<Vectors>(tile, count, decay);
      }
    }
    const MatrixView<const Scalar> all_values = values;
    if (hides) values = only_finite(values, rules.hides_elements() ? KeyRange{} : tile.run.inside(scores.keys));

    for_row_tiles<kTileRows>(
        value_dim, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> weighted(&values(0, d), 1, values.row_stride, weights, width, count);
          weighted.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
            Scalar* const o = tile.output + (d + r) * width + v * N;
            simd::store(o, simd::pmadd(simd::load(o), decay[v], x));
          });
        });
    if (values.data != all_values.data) add_not_finite(tile, scores, all_values);
  }

  /// output = decay·output + weights·values
  template <int Vectors>
  void add_values_in_pairs(const Tile& tile, Index count, const Packet (&decay)[Vectors]) {
    constexpr Index width = Vectors * N;
    for (int v = 0; v < Vectors; ++v) {
      if (Eigen::internal::predux_min(decay[v]) == 1) continue;
      for (Index d = 0; d < output_rows_; ++d) {
        Scalar* const o = tile.output + d * width + v * N;
        simd::store(o, simd::pmul(simd::load(o), decay[v]));
      }
    }
    multiply_pairs<Vectors, true>(value_columns_ + first_key_, kValueRows, weight_pairs_, width, output_rows_,
                                  padded(count, kPairDepth) / 2, tile.output, width);
  }

  /// 0·NaN is NaN: where some queries must not see a key whose value is not finite, that value is taken out of the
  /// product and added for the queries that do see it.
  MatrixView<const Scalar> only_finite(MatrixView<const Scalar> values, KeyRange seen_by_all) {
    bool finite = true;
    for (Index j = 0; j < values.rows && finite; ++j) {
      finite = seen_by_all.contains(j) || row_is_finite(&values(j, 0), values.cols);
    }
    if (finite) return values;
    for (Index j = 0; j < values.rows; ++j) {
      for (Index d = 0; d < values.cols; ++d) {
        finite_values_[j * values.cols + d] = is_finite(values(j, d)) ? values(j, d) : Scalar(0);
      }
    }
    return {finite_values_, values.rows, values.cols, values.cols, 1};
  }
  void add_not_finite(const Tile& tile, const ScoreTile<Scalar>& weights, MatrixView<const Scalar> values) const {
    for (Index j = 0; j < values.rows; ++j) {
      for (Index d = 0; d < values.cols; ++d) {
        if (is_finite(values(j, d))) continue;
        for (Index l = 0; l < weights.width; ++l) {
          const Scalar weight = weights.scores[j * weights.width + l];
          if (!is_zero(weight)) tile.output[d * weights.width + l] += weight * values(j, d);
        }
      }
    }
  }

  /// Divides by the sum of weights; writes the rows and their log-sum-exp. A query without keys gets 0 and -inf.
  void finish(const Tile& tile, const AttentionTensors& x, const ScoreRules<Scalar>& rules, Index b, Index h) {
    using Lanes = Eigen::Array<double, Eigen::Dynamic, 1, 0, kWidth, 1>;
    using Row = Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>>;
    const double nothing = -std::numeric_limits<double>::infinity(), gain = rules.params().dropout.gain();
    const std::optional<double> sink = rules.sink(h);
    const Index first = tile.run.queries.begin, rows = tile.run.queries.end - first, width = tile.width();
    const Lanes sum = Row(tile.sum, width).template cast<double>(),
                maximum = Row(tile.maximum, width).template cast<double>();
    const Lanes offset = maximum * static_cast<double>(rules.factor());  // in units of log2, as all of this
    Lanes reciprocal = gain / sum, lse = offset + sum.log() * std::numbers::log2e;
    for (Index i = 0; i < width; ++i) {
      const bool apart = std::abs(offset[i]) > kApart<Scalar>;
      if (is_zero(sum[i])) {
        reciprocal[i] = 0, lse[i] = sink.value_or(nothing);
      } else if (sink.has_value()) {
        lse[i] = std::max(lse[i], *sink) + std::log2(1 + std::exp2(-std::abs(lse[i] - *sink)));
        reciprocal[i] = gain / (sum[i] + std::exp2(apart ? rules.sink_above(h, maximum[i]) : *sink - offset[i]));
      }
      lse[i] *= std::numbers::ln2;
      // The backward pass normalises without it: here the rounding of the factor may not count
      if (apart && !is_zero(sum[i]) && !sink.has_value()) lse[i] = maximum[i] * rules.score_scale() + std::log(sum[i]);
    }
    alignas(64) Scalar inverse[kWidth];
    Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>(inverse, width) = reciprocal.template cast<Scalar>();
    for (Index i = 0; i < rows && x.lse.data != nullptr; ++i) {
      x.lse(b, h, first + i, 0) = lse[i];
    }
    RowWriter<Scalar>(x.output.head(b, h, x.heads())).unpack(first, rows, tile.output, tile.width(), inverse, buffer_);
  }

  Scratch scratch_;
  Scalar* scores_;                           // [keys][width], then the weights
  Scalar *keys_, *values_, *finite_values_;  // [keys][D], [keys][Dv]: where they can't be read as they lie
  Scalar* buffer_;
  // In pairs:
  Eigen::bfloat16 *key_rows_, *value_rows_,
      *value_columns_;           // [key rows][padded D], [value rows][padded Dv], transposed
  Pair *words_, *weight_pairs_;  // scratch, [keys/2][width]
  Index pair_dim_, pair_value_dim_, output_rows_, first_key_;  // padded; the first key of a tile in its block
  bool in_pairs_, values_in_pairs_;
  Tile tiles_[LaneGroups<Scalar>::kMost];
};

}  // namespace detail

/// output = softmax(scores over the keys that the mask allows)·v without ever storing the scores; AttentionParams says
/// what a score is. q [B,H,Lq,D], k [B or 1,Hk,Lk,D], v [B or 1,Hk,Lk,Dv], output [B,H,Lq,Dv], any strides; Hk divides
/// H, and each k head serves a run of q heads. float, double, or bfloat16 and half (summed in float). lse [B,H,Lq,1]
/// is the natural logarithm of the sum of exponentials (double because rounding it to float would cost up to 22 times
/// the naive error in the backward pass; a null view is not written). A query that sees no key gets output 0 and lse
/// -inf, or the sink, which is all that is left in its softmax. Nothing of a key reaches a query that does not see it.
/// Workspace: ForwardGroup::workspace_bytes(D, Dv) a worker. Results are bit-equal for any number of workers.
/// Throws headroom.core.attention.{shape,scale,dropout,length,output}.
template <Storable T, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_forward(std::type_identity_t<TensorView<const T>> q, std::type_identity_t<TensorView<const T>> k,
                       std::type_identity_t<TensorView<const T>> v, TensorView<T> output, TensorView<double> lse,
                       const AttentionParams& params = {}, const M& mask = {}, const E& executor = {}) {
  using Group = detail::ForwardGroup<ComputeType<T>>;
  const detail::AttentionTensors x{q, k, v, output, lse};
  detail::check_shapes(x, params);
  detail::check_writable("the output", output);
  const detail::ScoreRules<ComputeType<T>> rules(params, detail::MaskRef(mask), x);
  const Index heads = q.batch() * q.heads();
  const detail::LaneGroups<ComputeType<T>> groups(q.length(), heads, q.dim() + v.dim());
  const Index tasks = heads * groups.count();
  if (tasks == 0) return;
  const Index bytes = Group::workspace_bytes(q.dim(), v.dim());
  const auto workspace = executor.allocate(bytes * executor.workers());
  executor.run(tasks, [&](Index task, int worker) {
    const Index head = task / groups.count();
    const Index group = groups.count() - 1 - task % groups.count();  // under a causal mask the longest first
    Group(workspace.data() + worker * bytes, q.dim(), v.dim())
        .run(x, rules, head / q.heads(), head % q.heads(), groups.first_tile(group), groups.tiles(group));
  });
}

}  // namespace headroom::inline v0::core
