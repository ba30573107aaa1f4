#pragma once

#include "headroom/core/attention_problem.hpp"
#include "headroom/core/executor.hpp"
#include "headroom/core/register_tile.hpp"

namespace headroom::inline v0::core {
namespace detail {

/// Forward of a few tiles of queries against all keys, one block of keys at a time (streaming softmax, Milakov &
/// Gimelshein 2018; Dao et al. 2022). Queries fill the lanes; keys and values are read where they lie.
template <class Scalar>
class ForwardGroup {
 public:
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;
  static constexpr Index kTiles = kGroupBytes / (kWidth * sizeof(Scalar));  // they share a block of keys in cache
  static constexpr Index kKeys = 16 * kTileRows;                            // keys in a block: its scores stay in L1

  ForwardGroup(std::byte* workspace, Index dim, Index value_dim) : scratch_(workspace) {
    scores_ = scratch_.take(kKeys * kWidth);
    for (Tile& tile : tiles_) {
      tile.query = scratch_.take(dim * kWidth);
      tile.output = scratch_.take(value_dim * kWidth);
      tile.maximum = scratch_.take(kWidth);
      tile.sum = scratch_.take(kWidth);
    }
  }
  static Index workspace_bytes(Index dim, Index value_dim) {
    return ForwardGroup(nullptr, dim, value_dim).scratch_.bytes();
  }

  /// Computes rows [queries of tiles first … first + kTiles) of head (b,h).
  void run(const TensorView<const Scalar>& q, const TensorView<const Scalar>& k, const TensorView<const Scalar>& v,
           const TensorView<Scalar>& output, const TensorView<double>& lse, double scale, const MaskRef& mask, Index b,
           Index h, Index first_tile) {
    const LaneTiling<Scalar> tiling(q.length());
    const Index count = std::min(kTiles, tiling.tiles - first_tile);
    const MatrixView<const Scalar> queries = q.head(b, h), keys = k.head(b, h), values = v.head(b, h);
    // Scores stay unscaled sums in both passes, bit for bit the same; the scale joins inside the exponent. A negative
    // scale flips the sign of q instead, which is exact.
    const Scalar factor = static_cast<Scalar>(std::abs(scale) * std::numbers::log2e);
    KeyRange needed{keys.rows, 0};
    for (Index t = 0; t < count; ++t) {
      Tile& tile = tiles_[t];
      const auto [begin, vectors] = tiling[first_tile + t];
      tile.begin = begin;
      tile.vectors = vectors;
      tile.rows = std::min(tiling[first_tile + t].width(), q.length() - begin);
      tile.ranges = Ranges(mask, b, h, begin, tile.rows, keys.rows);
      const Index width = tile.width();
      pack_lanes(tile.query, width, 0, queries.middle_rows(begin, tile.rows), scale < 0 ? Scalar(-1) : Scalar(1));
      std::fill_n(tile.output, v.dim() * width, Scalar(0));
      std::fill_n(tile.sum, width, Scalar(0));
      std::fill_n(tile.maximum, width, std::numeric_limits<Scalar>::lowest());
      needed = {std::min(needed.begin, tile.ranges.any.begin), std::max(needed.end, tile.ranges.any.end)};
    }
    for (Index key = needed.begin; key < needed.end; key += kKeys) {
      const Index block = std::min(kKeys, needed.end - key);
      for (Index t = 0; t < count; ++t) {
        Tile& tile = tiles_[t];
        const KeyRange part = tile.ranges.any & KeyRange{key, key + block};
        if (part.empty()) continue;
        const auto k_part = keys.middle_rows(part.begin, part.end - part.begin);
        const auto v_part = values.middle_rows(part.begin, part.end - part.begin);
        if (tile.vectors == kTileVectors) {
          with_head_dim<Scalar>(q.dim(), v.dim(), [&]<int HeadDim> {
            attend<kTileVectors, HeadDim>(tile, k_part, v_part, part, factor);
          });
        } else if (tile.vectors == 2) {
          attend<2, Eigen::Dynamic>(tile, k_part, v_part, part, factor);
        } else {
          attend<1, Eigen::Dynamic>(tile, k_part, v_part, part, factor);
        }
      }
    }
    for (Index t = 0; t < count; ++t) finish(tiles_[t], output.head(b, h), lse, b, h, factor);
  }

 private:
  using Packet = simd::Packet<Scalar>;
  using Ranges = QueryRanges<Scalar, kWidth>;
  static constexpr Index N = simd::kLanes<Scalar>;

  struct Tile {
    Scalar* query;    // [D][width]
    Scalar* output;   // [Dv][width]: sum of weights times values
    Scalar* maximum;  // [width]: largest score so far
    Scalar* sum;      // [width]: sum of weights
    Ranges ranges;    // the keys that each query may see
    Index begin, rows;
    int vectors;
    Index width() const { return vectors * N; }
  };

  /// Adds a block of keys to a tile: scores, weights relative to the running maximum, weighted sum of values.
  template <int Vectors, int HeadDim>
  EIGEN_DONT_INLINE void attend(const Tile& tile, MatrixView<const Scalar> keys, MatrixView<const Scalar> values,
                                KeyRange block, Scalar factor) {
    constexpr Index width = Vectors * N;
    const Index dim = HeadDim == Eigen::Dynamic ? keys.cols : HeadDim;
    const Index value_dim = HeadDim == Eigen::Dynamic ? values.cols : HeadDim;
    const bool masked = !tile.ranges.covers(block);
    Scalar* const scores = scores_;  // [keys][width], then the weights
    const auto visible = [&](Index key, int v, Packet x, Packet otherwise) __attribute__((always_inline)) {
      return simd::keep_inside<Packet>(simd::broadcast(static_cast<Scalar>(block.begin + key)),
                                       simd::load(tile.ranges.first + v * N), simd::load(tile.ranges.last + v * N), x,
                                       otherwise);
    };

    Packet before[Vectors], maximum[Vectors];
    for (int v = 0; v < Vectors; ++v) before[v] = maximum[v] = simd::load(tile.maximum + v * N);
    for_row_tiles<kTileRows>(
        keys.rows, [&]<int Rows>(Index key) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> score(&keys(key, 0), keys.row_stride, keys.col_stride, tile.query, width,
                                                    dim);
          if (masked) [[unlikely]] {
            score.for_each([&](int r, int v, Packet& s) { s = visible(key + r, v, s, before[v]); });
          }
          score.for_each([&](int r, int v, Packet s) __attribute__((always_inline)) {
            maximum[v] = simd::pmax(s, maximum[v]);
            simd::store(scores + (key + r) * width + v * N, s);
          });
        });

    Packet decay[Vectors], sum[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      decay[v] = simd::exp2<Scalar>(simd::pmul(simd::psub(before[v], maximum[v]), simd::broadcast(factor)));
      sum[v] = simd::broadcast(Scalar(0));
      simd::store(tile.maximum + v * N, maximum[v]);
    }
    const auto weigh = [&]<bool Masked>() __attribute__((always_inline)) {
      for (Index key = 0; key < keys.rows; ++key) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          Scalar* const s = scores + key * width + v * N;
          Packet weight =
              simd::exp2<Scalar>(simd::pmul(simd::psub(simd::load(s), maximum[v]), simd::broadcast(factor)));
          if constexpr (Masked) weight = visible(key, v, weight, simd::broadcast(Scalar(0)));
          sum[v] = simd::padd(sum[v], weight);
          simd::store(s, weight);
        }
      }
    };
    masked ? weigh.template operator()<true>() : weigh.template operator()<false>();
    for (int v = 0; v < Vectors; ++v) {
      simd::store(tile.sum + v * N, simd::pmadd(simd::load(tile.sum + v * N), decay[v], sum[v]));
    }

    for_row_tiles<kTileRows>(
        value_dim, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> weighted(&values(0, d), values.col_stride, values.row_stride, scores,
                                                       width, keys.rows);
          weighted.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
            Scalar* const o = tile.output + (d + r) * width + v * N;
            simd::store(o, simd::pmadd(simd::load(o), decay[v], x));
          });
        });
  }

  /// Divides by the sum of weights; writes the rows and their log-sum-exp. A query without keys gets 0 and -inf.
  static void finish(const Tile& tile, MatrixView<Scalar> output, const TensorView<double>& lse, Index b, Index h,
                     Scalar factor) {
    alignas(64) Scalar inverse[kWidth];
    for (Index i = 0; i < tile.width(); ++i) {
      double reciprocal = 1 / static_cast<double>(tile.sum[i]);
      simd::keep(reciprocal);  // -ffast-math would divide in float, and approximate that
      inverse[i] = tile.sum[i] == 0 ? Scalar(0) : static_cast<Scalar>(reciprocal);
    }
    unpack_lanes(output.middle_rows(tile.begin, tile.rows), tile.output, tile.width(), inverse);
    if (lse.data == nullptr) return;
    for (Index i = 0; i < tile.rows; ++i) {
      const double offset = static_cast<double>(tile.maximum[i]) * static_cast<double>(factor);
      lse(b, h, tile.begin + i, 0) = tile.sum[i] == 0
                                         ? -std::numeric_limits<double>::infinity()
                                         : (offset + std::log2(static_cast<double>(tile.sum[i]))) * std::numbers::ln2;
    }
  }

  Scratch<Scalar> scratch_;
  Scalar* scores_;
  Tile tiles_[kTiles];
};

}  // namespace detail

/// output = softmax(scale·q·kᵀ over the keys that the mask allows)·v without ever storing the scores.
/// q [B,H,Lq,D], k [B,H,Lk,D], v [B,H,Lk,Dv], output [B,H,Lq,Dv], lse [B,H,Lq,1] (natural logarithm of the sum of
/// exponentials; double because rounding it to float would cost up to 22 times the naive error in the backward pass; a
/// null view is not written). A query that sees no key gets output 0 and lse -inf. Any strides.
/// Workspace: ForwardGroup::workspace_bytes(D, Dv) a worker. Results are bit-equal for any number of workers.
/// Throws headroom.core.attention.{shape,scale,length}.
template <class Scalar, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_forward(std::type_identity_t<TensorView<const Scalar>> q,
                       std::type_identity_t<TensorView<const Scalar>> k,
                       std::type_identity_t<TensorView<const Scalar>> v, TensorView<Scalar> output,
                       TensorView<double> lse, const AttentionParams& params = {}, const M& mask = {},
                       const E& executor = {}) {
  using Group = detail::ForwardGroup<Scalar>;
  detail::check_shapes<Scalar>(q, k, v, output, lse, params);
  const detail::MaskRef mask_ref(mask);
  const Index groups = (detail::LaneTiling<Scalar>(q.length()).tiles + Group::kTiles - 1) / Group::kTiles;
  const Index tasks = q.batch() * q.heads() * groups;
  if (tasks == 0) return;
  const Index bytes = Group::workspace_bytes(q.dim(), v.dim());
  const auto workspace = executor.allocate(bytes * executor.workers());
  executor.run(tasks, [&](Index task, int worker) {
    const Index head = task / groups;
    const Index group = groups - 1 - task % groups;  // under a causal mask the longest first
    Group(workspace.data() + worker * bytes, q.dim(), v.dim())
        .run(q, k, v, output, lse, params.scale_for(q.dim()), mask_ref, head / q.heads(), head % q.heads(),
             group * Group::kTiles);
  });
}

}  // namespace headroom::inline v0::core
