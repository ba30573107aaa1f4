#pragma once

#include "headroom/core/executor.hpp"
#include "headroom/core/score_rules.hpp"

namespace headroom::inline v0::core {
namespace detail {

/// Forward of a few tiles of queries against all keys, one block of keys at a time (streaming softmax, Milakov &
/// Gimelshein 2018; Dao et al. 2022). Queries fill the lanes; keys and values are read where they lie.
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
    for (Index t = 0; t < LaneGroups<Scalar>::most(dim + value_dim); ++t) {
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
    const RowReader<Scalar> queries(x.q.head(b, h, x.heads()), Rotation<Scalar>::of_queries(params)),
        keys(x.k.head(b, h, x.heads()), Rotation<Scalar>::of_keys(params)), values(x.v.head(b, h, x.heads()));
    KeyRange needed{length, 0};
    for (Index t = 0; t < count; ++t) {
      Tile& tile = tiles_[t];
      const auto lanes = tiling[first_tile + t];
      const Index rows = std::min(lanes.width(), x.q.length() - lanes.begin), width = lanes.width();
      tile.vectors = lanes.vectors;
      tile.run = Run(rules.mask(), params, b, h, {lanes.begin, lanes.begin + rows}, length);
      if (rows < width) std::fill_n(tile.query, x.q.dim() * width, Scalar(0));
      queries.pack(tile.query, width, 0, lanes.begin, rows, Times<Scalar>{rules.sign()}, buffer_);
      std::fill_n(tile.output, x.v.dim() * width, Scalar(0));
      std::fill_n(tile.sum, width, Scalar(0));
      std::fill_n(tile.maximum, width, kHidden<Scalar> / 2);  // above every hidden score, below every other
      needed = {std::min(needed.begin, tile.run.any.begin), std::max(needed.end, tile.run.any.end)};
    }
    for (Index key = needed.begin; key < needed.end; key += kKeys) {
      const KeyRange block{key, std::min(key + kKeys, needed.end)};
      MatrixView<const Scalar> k_block, v_block;
      for (Index t = 0; t < count; ++t) {
        const Tile& tile = tiles_[t];
        const KeyRange part = tile.run.any & block;
        if (part.empty() || (rules.hides_elements() && !rules.sees_any(b, h, tile.run.queries, part))) continue;
        if (k_block.data == nullptr) {  // the first tile that needs them
          k_block = keys.rows(block.begin, block.end - block.begin, keys_);
          v_block = values.rows(block.begin, block.end - block.begin, values_);
        }
        const Index skip = part.begin - block.begin, rows = part.end - part.begin;
        const ScoreTile<Scalar> scores{scores_, tile.width(), b, h, part};
        attend(tile, scores, k_block.middle_rows(skip, rows), v_block.middle_rows(skip, rows), rules);
      }
    }
    for (Index t = 0; t < count; ++t) finish(tiles_[t], x, rules, b, h);
  }

 private:
  using Packet = simd::Packet<Scalar>;
  using Run = QueryRun<Scalar, kWidth>;
  static constexpr Index N = simd::kLanes<Scalar>;

  struct Tile {
    Scalar* query;    // [D][width]
    Scalar* output;   // [Dv][width]: sum of weights times values
    Scalar* maximum;  // [width]: largest score so far
    Scalar* sum;      // [width]: sum of weights
    Run run;
    int vectors;
    Index width() const { return vectors * N; }
  };

  void attend(const Tile& tile, const ScoreTile<Scalar>& scores, MatrixView<const Scalar> keys,
              MatrixView<const Scalar> values, const ScoreRules<Scalar>& rules) {
    if (tile.vectors == kTileVectors) {
      with_head_dim<Scalar>(keys.cols, values.cols,
                            [&]<int HeadDim> { attend<kTileVectors, HeadDim>(tile, scores, keys, values, rules); });
    } else if (tile.vectors == 2) {
      attend<2, Eigen::Dynamic>(tile, scores, keys, values, rules);
    } else {
      attend<1, Eigen::Dynamic>(tile, scores, keys, values, rules);
    }
  }

  /// Adds a block of keys to a tile: scores, weights relative to the running maximum, weighted sum of values.
  template <int Vectors, int HeadDim>
  EIGEN_DONT_INLINE void attend(const Tile& tile, const ScoreTile<Scalar>& scores, MatrixView<const Scalar> keys,
                                MatrixView<const Scalar> values, const ScoreRules<Scalar>& rules) {
    constexpr Index width = Vectors * N;
    const Index dim = HeadDim == Eigen::Dynamic ? keys.cols : HeadDim;
    const Index value_dim = HeadDim == Eigen::Dynamic ? values.cols : HeadDim;
    Scalar* const weights = scores.scores;  // [keys][width]

    Packet before[Vectors], maximum[Vectors];
    for (int v = 0; v < Vectors; ++v) before[v] = maximum[v] = simd::load(tile.maximum + v * N);
    for_row_tiles<kTileRows>(
        keys.rows, [&]<int Rows>(Index key) __attribute__((always_inline)) {
          rules.prefetch(scores, tile.run, key);
          RegisterTile<Scalar, Rows, Vectors> score(&keys(key, 0), keys.row_stride, 1, tile.query, width, dim);
          score.for_each([&](int r, int v, Packet s) __attribute__((always_inline)) {
            maximum[v] = simd::pmax(s, maximum[v]);
            simd::store(weights + (key + r) * width + v * N, s);
          });
        });
    const bool hides = rules.hides_elements() || !tile.run.covers(scores.keys);
    if (rules.scaled() || hides) [[unlikely]] {
      rules.template apply<true>(scores, tile.run, nullptr, buffer_);
      for (int v = 0; v < Vectors; ++v) {
        maximum[v] = before[v];
        for (Index key = 0; key < keys.rows; ++key) {
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
    for (Index key = 0; key < keys.rows; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Scalar* const s = weights + key * width + v * N;
        const Packet weight = simd::exp2<Scalar>(simd::pmul(simd::psub(simd::load(s), maximum[v]), factor));
        sum[v] = simd::padd(sum[v], weight);
        simd::store(s, weight);
      }
    }
    for (int v = 0; v < Vectors; ++v) {
      simd::store(tile.sum + v * N, simd::pmadd(simd::load(tile.sum + v * N), decay[v], sum[v]));
    }
    if (rules.params().dropout.active()) rules.drop(scores, tile.run);
    const MatrixView<const Scalar> all_values = values;
    if (hides) values = only_finite(values, rules.hides_elements() ? KeyRange{} : tile.run.inside(scores.keys));

    for_row_tiles<kTileRows>(
        value_dim, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> weighted(&values(0, d), 1, values.row_stride, weights, width, keys.rows);
          weighted.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
            Scalar* const o = tile.output + (d + r) * width + v * N;
            simd::store(o, simd::pmadd(simd::load(o), decay[v], x));
          });
        });
    if (values.data != all_values.data) add_not_finite(tile, scores, all_values);
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
          if (weight != 0) tile.output[d * weights.width + l] += weight * values(j, d);
        }
      }
    }
  }

  /// Divides by the sum of weights; writes the rows and their log-sum-exp. A query without keys gets 0 and -inf.
  void finish(const Tile& tile, const AttentionTensors& x, const ScoreRules<Scalar>& rules, Index b, Index h) {
    const double nothing = -std::numeric_limits<double>::infinity(), gain = rules.params().dropout.gain();
    const std::optional<double> sink = rules.sink(h);
    alignas(64) Scalar inverse[kWidth];
    const Index first = tile.run.queries.begin, rows = tile.run.queries.end - first;
    for (Index i = 0; i < tile.width(); ++i) {
      const double sum = static_cast<double>(tile.sum[i]);
      const double offset = static_cast<double>(tile.maximum[i]) * static_cast<double>(rules.factor());
      double reciprocal = 1 / sum, lse = offset + std::log2(sum);  // in units of log2
      if (sink.has_value() && sum != 0) {
        lse = std::max(lse, *sink) + std::log2(1 + std::exp2(-std::abs(lse - *sink)));
        reciprocal = std::exp2(offset - lse);
      }
      reciprocal *= gain;
      simd::keep(reciprocal);  // -ffast-math would divide in float, and approximate that
      inverse[i] = sum == 0 ? Scalar(0) : static_cast<Scalar>(reciprocal);
      if (x.lse.data != nullptr && i < rows) {
        x.lse(b, h, first + i, 0) = (sum == 0 ? sink.value_or(nothing) : lse) * std::numbers::ln2;
      }
    }
    RowWriter<Scalar>(x.output.head(b, h, x.heads())).unpack(first, rows, tile.output, tile.width(), inverse, buffer_);
  }

  Scratch scratch_;
  Scalar* scores_;                           // [keys][width], then the weights
  Scalar *keys_, *values_, *finite_values_;  // [keys][D], [keys][Dv]: where they can't be read as they lie
  Scalar* buffer_;
  Tile tiles_[LaneGroups<Scalar>::kMost];
};

}  // namespace detail

/// output = softmax(scores over the keys that the mask allows)·v without ever storing the scores; AttentionParams says
/// what a score is. q [B,H,Lq,D], k [B or 1,Hk,Lk,D], v [B or 1,Hk,Lk,Dv], output [B,H,Lq,Dv], any strides; Hk divides
/// H, and each k head serves a run of q heads. float, double, or bfloat16 and half (computed in float). lse [B,H,Lq,1]
/// is the natural logarithm of the sum of exponentials (double because rounding it to float would cost up to 22 times
/// the naive error in the backward pass; a null view is not written). A query that sees no key gets output 0 and lse
/// -inf. Workspace: ForwardGroup::workspace_bytes(D, Dv) a worker. Results are bit-equal for any number of workers.
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
