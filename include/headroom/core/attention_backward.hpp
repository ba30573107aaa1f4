#pragma once

#include <atomic>
#include <thread>

#include "headroom/core/attention_problem.hpp"
#include "headroom/core/executor.hpp"
#include "headroom/core/register_tile.hpp"

namespace headroom::inline v0::core {
namespace detail {

/// All tensors of one backward pass; shapes as in attention_backward.
template <class Scalar>
struct BackwardTensors {
  TensorView<const Scalar> grad_output, q, k, v, output;
  TensorView<const double> lse;
  TensorView<Scalar> grad_q, grad_k, grad_v;
};

/// Backward of a few tiles of keys against all queries, one block of queries at a time. Keys fill the lanes; queries
/// and output gradients are read where they lie. With P = weights, dP = grad_output·vᵀ, delta =
/// sum(grad_output·output):
///   dS = P·(dP - delta),  grad_v = Pᵀ·grad_output,  grad_k = scale·dSᵀ·q,  grad_q = scale·dS·k.
///
/// Several groups add to the same rows of grad_q. They take turns, block by block and in ascending order, so that the
/// sums are the same bits for any number of workers and nobody needs an accumulator of his own.
template <class Scalar>
class BackwardGroup {
 public:
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;
  static constexpr Index kTiles = kGroupBytes / (kWidth * sizeof(Scalar));
  static constexpr Index kQueries = 16 * kTileRows;  // queries in a block: its weights stay in L1

  /// What the groups of one head share.
  struct Head {
    Index b, h;
    Scalar* delta;            // [Lq], written by the first group
    std::atomic<int>* turns;  // [blocks of queries]: groups that are done with the block; null when groups run in order
  };

  BackwardGroup(std::byte* workspace, Index dim, Index value_dim)
      : padded_dim_((dim + N - 1) / N * N), scratch_(workspace) {
    weights_ = scratch_.take(kQueries * kWidth);
    grad_scores_ = scratch_.take(kQueries * kWidth);
    grad_queries_ = scratch_.take(kQueries * padded_dim_);
    lanes_ = scratch_.take(2 * N * value_dim);
    for (Tile& tile : tiles_) {
      tile.key = scratch_.take(dim * kWidth);
      tile.value = scratch_.take(value_dim * kWidth);
      tile.grad_key = scratch_.take(dim * kWidth);
      tile.grad_value = scratch_.take(value_dim * kWidth);
      tile.scaled_key = scratch_.take(kWidth * padded_dim_);
    }
  }
  static Index workspace_bytes(Index dim, Index value_dim) {
    return BackwardGroup(nullptr, dim, value_dim).scratch_.bytes();
  }
  static Index groups(Index keys) {
    return std::max<Index>((LaneTiling<Scalar>(keys).tiles + kTiles - 1) / kTiles,
                           1);  // one even without keys: it clears grad_q
  }
  static Index blocks(Index queries) { return (queries + kQueries - 1) / kQueries; }

  void run(const BackwardTensors<Scalar>& x, double scale, const MaskRef& mask, const Head& head, Index group) {
    const auto [b, h, delta, turns] = head;
    const LaneTiling<Scalar> tiling(x.k.length());
    const Index count = std::min(kTiles, tiling.tiles - group * kTiles);
    const KeyRange seen = seen_keys(mask, b, h, x.q.length(), x.k.length());
    for (Index t = 0; t < count; ++t) {
      open(tiles_[t], tiling[group * kTiles + t], x.k.head(b, h), x.v.head(b, h), seen, scale);
    }
    const KeyRange keys = count == 0 ? KeyRange{} : KeyRange{tiles_[0].keys.begin, tiles_[count - 1].keys.end};

    const MatrixView<const Scalar> q = x.q.head(b, h), g = x.grad_output.head(b, h), o = x.output.head(b, h);
    for (Index block = 0; block < blocks(q.rows); ++block) {
      const Index first = block * kQueries;
      const Index rows = std::min(kQueries, q.rows - first);
      const MatrixView<Scalar> grad_q = x.grad_q.head(b, h).middle_rows(first, rows);
      if (turns != nullptr) {
        while (turns[block].load(std::memory_order_acquire) != group) std::this_thread::yield();
      }
      if (group == 0) {
        write_delta(delta + first, g.middle_rows(first, rows), o.middle_rows(first, rows));
        for (Index i = 0; i < rows; ++i) {
          for (Index d = 0; d < grad_q.cols; ++d) grad_q(i, d) = 0;
        }
      }
      ranges_ = Ranges(mask, b, h, first, rows, x.k.length());
      if (ranges_.touches(keys)) {
        split_lse(x.lse, b, h, first, rows, static_cast<double>(factor_of(scale)));
        std::fill_n(grad_queries_, rows * padded_dim_, Scalar(0));
        for (Index t = 0; t < count; ++t) {
          const Tile& tile = tiles_[t];
          if (!ranges_.touches(tile.keys)) continue;
          const auto q_block = q.middle_rows(first, rows), g_block = g.middle_rows(first, rows);
          switch (tile.vectors) {
            case 1:
              accumulate<1>(tile, q_block, g_block, delta + first, scale);
              break;
            case 2:
              accumulate<2>(tile, q_block, g_block, delta + first, scale);
              break;
            default:
              accumulate<kTileVectors>(tile, q_block, g_block, delta + first, scale);
          }
        }
        for (Index i = 0; i < rows; ++i) {
          for (Index d = 0; d < grad_q.cols; ++d) grad_q(i, d) += grad_queries_[i * padded_dim_ + d];
        }
      }
      if (turns != nullptr) turns[block].store(static_cast<int>(group) + 1, std::memory_order_release);
    }
    for (Index t = 0; t < count; ++t) close(tiles_[t], x.grad_k.head(b, h), x.grad_v.head(b, h), scale);
  }

 private:
  using Packet = simd::Packet<Scalar>;
  using Ranges = QueryRanges<Scalar, kQueries>;
  static constexpr Index N = simd::kLanes<Scalar>;

  struct Tile {
    Scalar *key, *value;  // [D][width], [Dv][width]; the sign of a negative scale is in the key, as in q forward
    Scalar *grad_key, *grad_value;  // [D][width] without the scale, [Dv][width]
    Scalar* scaled_key;             // [width][padded D]: scale·k
    KeyRange keys;
    int vectors;
    Index width() const { return vectors * N; }
  };

  static Scalar factor_of(double scale) { return static_cast<Scalar>(std::abs(scale) * std::numbers::log2e); }

  /// The range outside which no query of the head sees a key.
  static KeyRange seen_keys(const MaskRef& mask, Index b, Index h, Index queries, Index keys) {
    KeyRange seen{keys, 0};
    for (Index first = 0; first < queries; first += kQueries) {
      const KeyRange any = Ranges(mask, b, h, first, std::min(kQueries, queries - first), keys).any;
      seen = {std::min(seen.begin, any.begin), std::max(seen.end, any.end)};
    }
    return seen;
  }

  /// Keys that nobody sees are not read: whatever they hold, NaN included, stays out of every product.
  void open(Tile& tile, typename LaneTiling<Scalar>::Tile lanes, MatrixView<const Scalar> k, MatrixView<const Scalar> v,
            KeyRange seen, double scale) const {
    tile.keys = {lanes.begin, std::min(lanes.begin + lanes.width(), k.rows)};
    tile.vectors = lanes.vectors;
    const Index width = tile.width();
    const KeyRange read = tile.keys & seen;
    const Index skip = std::max<Index>(read.begin - tile.keys.begin, 0);
    const Index count = std::max<Index>(read.end - read.begin, 0);
    const auto k_tile = k.middle_rows(tile.keys.begin + skip, count);
    pack_lanes(tile.key, width, skip, k_tile, scale < 0 ? Scalar(-1) : Scalar(1));
    pack_lanes(tile.value, width, skip, v.middle_rows(tile.keys.begin + skip, count), Scalar(1));
    std::fill_n(tile.grad_key, k.cols * width, Scalar(0));
    std::fill_n(tile.grad_value, v.cols * width, Scalar(0));
    std::fill_n(tile.scaled_key, width * padded_dim_, Scalar(0));
    for (Index i = 0; i < count; ++i) {
      for (Index d = 0; d < k.cols; ++d) {
        tile.scaled_key[(skip + i) * padded_dim_ + d] = static_cast<Scalar>(scale) * k_tile(i, d);
      }
    }
  }

  static void close(const Tile& tile, MatrixView<Scalar> grad_k, MatrixView<Scalar> grad_v, double scale) {
    const Index count = tile.keys.end - tile.keys.begin;
    alignas(64) Scalar factor[kWidth];
    std::fill_n(factor, kWidth, static_cast<Scalar>(scale));
    unpack_lanes(grad_k.middle_rows(tile.keys.begin, count), tile.grad_key, tile.width(), factor);
    std::fill_n(factor, kWidth, Scalar(1));
    unpack_lanes(grad_v.middle_rows(tile.keys.begin, count), tile.grad_value, tile.width(), factor);
  }

  /// delta[i] = sum_d g(i,d)·o(i,d), added in the order in which accumulate() adds dP: with one key the two are equal.
  void write_delta(Scalar* delta, MatrixView<const Scalar> g, MatrixView<const Scalar> o) {
    for (Index i = 0; i < g.rows; i += N) {
      const Index rows = std::min(N, g.rows - i);
      Scalar *g_lanes = lanes_, *o_lanes = lanes_ + N * g.cols;
      pack_lanes(g_lanes, N, 0, g.middle_rows(i, rows), Scalar(1));
      pack_lanes(o_lanes, N, 0, o.middle_rows(i, rows), Scalar(1));
      Packet sum = simd::broadcast(Scalar(0));
      for (Index d = 0; d < g.cols; ++d) {
        sum = simd::pmadd(simd::load(g_lanes + d * N), simd::load(o_lanes + d * N), sum);
      }
      alignas(64) Scalar sums[N];
      simd::store(sums, sum);
      std::copy_n(sums, rows, delta + i);
    }
  }

  /// Splits the lse into what is subtracted from a score and what is subtracted from the exponent after scaling. The
  /// first is close to the largest scores, so that their difference is exact; one float alone would lose the rest.
  void split_lse(const TensorView<const double>& lse, Index b, Index h, Index first, Index rows, double factor) {
    for (Index i = 0; i < rows; ++i) {
      const double base2 = lse(b, h, first + i, 0) * std::numbers::log2e;
      const double score = factor > 0 ? base2 / factor : 0;
      const bool fits = std::abs(score) < static_cast<double>(std::numeric_limits<Scalar>::max());
      lse_score_[i] = fits ? static_cast<Scalar>(score) : Scalar(0);
      lse_rest_[i] = static_cast<Scalar>(base2 - static_cast<double>(lse_score_[i]) * factor);
    }
  }

  /// A block of queries against a tile of keys: five products.
  template <int Vectors>
  EIGEN_DONT_INLINE void accumulate(const Tile& tile, MatrixView<const Scalar> q, MatrixView<const Scalar> g,
                                    const Scalar* delta, double scale) {
    constexpr Index width = Vectors * N;
    const Index rows = q.rows;
    Scalar *const weights = weights_, *const grad_scores = grad_scores_;  // [rows][width]
    const Packet factor = simd::broadcast(factor_of(scale));
    // also masked: the lanes past the last key
    const bool masked = !ranges_.covers({tile.keys.begin, tile.keys.begin + width});
    Packet position[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      position[v] = Eigen::internal::plset<Packet>(static_cast<Scalar>(tile.keys.begin + v * N));
    }

    // forward did: weight = exp2((score - maximum)·factor) / sum
    for_row_tiles<kTileRows>(
        rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> score(&q(row, 0), q.row_stride, q.col_stride, tile.key, width, q.cols);
          score.for_each([&](int r, int v, Packet& s) __attribute__((always_inline)) {
            s = simd::psub(s, simd::broadcast(lse_score_[row + r]));
            s = simd::exp2<Scalar>(simd::pmadd(s, factor, simd::broadcast(-lse_rest_[row + r])));
            if (masked) [[unlikely]] {
              s = simd::keep_inside<Packet>(position[v], simd::broadcast(ranges_.first[row + r]),
                                            simd::broadcast(ranges_.last[row + r]), s, simd::broadcast(Scalar(0)));
            }
            simd::store(weights + (row + r) * width + v * N, s);
          });
        });
    for_row_tiles<kTileRows>(
        rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> grad(&g(row, 0), g.row_stride, g.col_stride, tile.value, width, g.cols);
          grad.for_each([&](int r, int v, Packet dp) __attribute__((always_inline)) {
            const Index at = (row + r) * width + v * N;
            simd::store(grad_scores + at,
                        simd::pmul(simd::load(weights + at), simd::psub(dp, simd::broadcast(delta[row + r]))));
          });
        });
    // forward did: score(i,j) = sum_d q(i,d)·k(j,d) and output(i,d) = sum_j weight(i,j)·v(j,d)
    add_transposed<Vectors>(tile.grad_value, g, weights);
    add_transposed<Vectors>(tile.grad_key, q, grad_scores);
    for_row_tiles<kTileVectors>(
        padded_dim_ / N, [&]<int V>(Index vector) __attribute__((always_inline)) {
          for_row_tiles<kTileRows>(
              rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
                RegisterTile<Scalar, Rows, V> grad(grad_scores + row * width, width, 1, tile.scaled_key + vector * N,
                                                   padded_dim_, width);
                grad.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
                  Scalar* const to = grad_queries_ + (row + r) * padded_dim_ + (vector + v) * N;
                  simd::store(to, simd::padd(simd::load(to), x));
                });
              });
        });
  }

  /// to[d][lane] += sum_i x(i,d)·s[i][lane]
  template <int Vectors>
  EIGEN_ALWAYS_INLINE static void add_transposed(Scalar* to, MatrixView<const Scalar> x, const Scalar* s) {
    constexpr Index width = Vectors * N;
    for_row_tiles<kTileRows>(
        x.cols, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          RegisterTile<Scalar, Rows, Vectors> sum(&x(0, d), x.col_stride, x.row_stride, s, width, x.rows);
          sum.for_each([&](int r, int v, Packet y) __attribute__((always_inline)) {
            Scalar* const at = to + (d + r) * width + v * N;
            simd::store(at, simd::padd(simd::load(at), y));
          });
        });
  }

  Index padded_dim_;
  Scratch<Scalar> scratch_;
  Scalar *weights_, *grad_scores_;  // [queries][width]
  Scalar* grad_queries_;            // [queries][padded D]
  Scalar* lanes_;                   // [2][Dv][N]
  Tile tiles_[kTiles];
  Ranges ranges_;
  alignas(64) Scalar lse_score_[kQueries], lse_rest_[kQueries];
};

}  // namespace detail

/// Gradients of attention_forward with respect to q, k and v, given the gradient of its output. `output` and `lse` are
/// what the forward pass wrote; weights are recomputed tile by tile. grad_q, grad_k and grad_v are overwritten and have
/// the shapes of q, k and v, any strides, and must not overlap with each other or with the inputs. Queries without keys
/// and keys without queries get gradient 0. Workspace: BackwardGroup::workspace_bytes(D, Dv) and delta [Lq] a worker.
/// Results are bit-equal for any number of workers. Throws headroom.core.attention.{shape,scale,length}.
template <class Scalar, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_backward(std::type_identity_t<TensorView<const Scalar>> grad_output,
                        std::type_identity_t<TensorView<const Scalar>> q,
                        std::type_identity_t<TensorView<const Scalar>> k,
                        std::type_identity_t<TensorView<const Scalar>> v,
                        std::type_identity_t<TensorView<const Scalar>> output, TensorView<const double> lse,
                        TensorView<Scalar> grad_q, TensorView<Scalar> grad_k, TensorView<Scalar> grad_v,
                        const AttentionParams& params = {}, const M& mask = {}, const E& executor = {}) {
  using Group = detail::BackwardGroup<Scalar>;
  detail::check_shapes<Scalar>(q, k, v, output, lse, params);
  detail::check_shapes<Scalar>(grad_q, grad_k, grad_v, grad_output, lse, params);
  require((lse.data != nullptr || q.length() == 0) && grad_q.shape == q.shape && grad_k.shape == k.shape,
          "headroom.core.attention.shape", "grad_q ", Shape{grad_q.shape}, " and grad_k ", Shape{grad_k.shape},
          " must have the shapes of q ", Shape{q.shape}, " and k ", Shape{k.shape}, ", and lse must be given");
  const detail::BackwardTensors<Scalar> tensors{grad_output, q, k, v, output, lse, grad_q, grad_k, grad_v};
  const detail::MaskRef mask_ref(mask);
  const double scale = params.scale_for(q.dim());

  // Whole heads for as long as every worker gets one; the last few heads are split among all workers.
  const Index workers = executor.workers(), heads = q.batch() * q.heads();
  const Index whole = heads / workers * workers, split = heads - whole;
  const Index groups = Group::groups(k.length()), blocks = Group::blocks(q.length());
  if (heads == 0) return;
  const Index group_bytes = Group::workspace_bytes(q.dim(), v.dim());
  detail::Scratch<Scalar> sizes(nullptr);
  sizes.take(q.length());
  const Index delta_bytes = sizes.bytes();
  const auto workspace = executor.allocate(workers * group_bytes + (workers + split) * delta_bytes +
                                           split * blocks * static_cast<Index>(sizeof(std::atomic<int>)));
  std::byte* const deltas = workspace.data() + workers * group_bytes;
  auto* const turns = reinterpret_cast<std::atomic<int>*>(deltas + (workers + split) * delta_bytes);
  for (Index i = 0; i < split * blocks; ++i) new (turns + i) std::atomic<int>(0);

  executor.run(whole + split * groups, [&](Index task, int worker) {
    Group group(workspace.data() + worker * group_bytes, q.dim(), v.dim());
    const auto head = [&](Index index, Index slot, std::atomic<int>* turn) {
      return typename Group::Head{index / q.heads(), index % q.heads(),
                                  reinterpret_cast<Scalar*>(deltas + slot * delta_bytes), turn};
    };
    if (task < whole) {
      const auto whole_head = head(task, worker, nullptr);
      for (Index g = 0; g < groups; ++g) group.run(tensors, scale, mask_ref, whole_head, g);
    } else {
      const Index s = (task - whole) % split;
      group.run(tensors, scale, mask_ref, head(whole + s, workers + s, turns + s * blocks), (task - whole) / split);
    }
  });
}

}  // namespace headroom::inline v0::core
