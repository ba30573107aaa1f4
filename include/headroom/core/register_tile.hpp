#pragma once

#include <algorithm>
#include <utility>

#include "headroom/core/simd.hpp"

namespace headroom::inline v0::core::detail {

/// Shape of the register tile: accumulators, one row of `b` and one broadcast of `a` fill the vector registers.
/// 32 registers hold 8 x 3 accumulators (11 loads per 24 FMAs), 16 registers 6 x 2.
inline constexpr bool kManyRegisters = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32;
inline constexpr int kTileRows = kManyRegisters ? 8 : 6;
inline constexpr int kTileVectors = kManyRegisters ? 3 : 2;

/// The one matrix product behind every step of attention: c(r,:) = sum_k a(r,k)·b(k,:), where rows of b fill vector
/// lanes and elements of a are broadcast from memory, so that a may have any strides and needs no packing.
template <class Scalar, int Rows, int Vectors>
struct RegisterTile {
  static constexpr int kLanes = simd::kLanes<Scalar>;
  simd::Packet<Scalar> c[Rows][Vectors];

  /// a(r,k) = a[r·a_row + k·a_depth], b(k,:) = b[k·b_depth …].
  EIGEN_ALWAYS_INLINE RegisterTile(const Scalar* a, Index a_row, Index a_depth, const Scalar* b, Index b_depth,
                                   Index depth) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) c[r][v] = simd::broadcast(Scalar(0));
    }
#pragma GCC unroll 1
    for (Index k = 0; k < depth; ++k, a += a_depth, b += b_depth) {
      simd::Packet<Scalar> b_row[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b_row[v] = simd::load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const simd::Packet<Scalar> a_element = simd::broadcast(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) c[r][v] = simd::pmadd(a_element, b_row[v], c[r][v]);
      }
    }
  }

  /// f(row, vector, packet) for every packet of the tile.
  template <class F>
  EIGEN_ALWAYS_INLINE void for_each(F&& f) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) f(r, v, c[r][v]);
    }
  }
};

/// f<count>(), where count is known to be from 1 to Most.
template <int Most, class F>
EIGEN_ALWAYS_INLINE void with_count(Index count, F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    ((count == I + 1 ? f.template operator()<I + 1>() : void()), ...);
  }
  (std::make_integer_sequence<int, Most>());
}

/// Splits `count` rows into tiles of at most Max rows, none much smaller than the others: f<rows>(first row).
template <int Max, class F>
EIGEN_ALWAYS_INLINE void for_row_tiles(Index count, F&& f) {
  Index row = 0;
  for (; count - row >= 2 * Max || count - row == Max; row += Max) f.template operator()<Max>(row);
  while (row < count) {
    const Index rows = count - row > Max ? (count - row + 1) / 2 : count - row;
    with_count<Max>(
        rows, [&]<int Rows>() __attribute__((always_inline)) { f.template operator()<Rows>(row); });
    row += rows;
  }
}

/// Lane tiles over `length` positions: as few tiles of at most kTileVectors packets as possible, the last ones smaller.
template <class Scalar>
struct LaneTiling {
  struct Tile {
    Index begin;
    int vectors;
    Index width() const { return vectors * Index(simd::kLanes<Scalar>); }
  };
  static constexpr Index kWidth = Index(kTileVectors) * simd::kLanes<Scalar>;

  explicit LaneTiling(Index length)
      : packets((length + simd::kLanes<Scalar> - 1) / simd::kLanes<Scalar>),
        tiles((packets + kTileVectors - 1) / kTileVectors) {}

  Tile operator[](Index tile) const {
    if (tiles == 1) return {0, static_cast<int>(packets)};
    const Index full = tiles - (tiles * kTileVectors - packets);  // the rest have one packet less
    const Index begin = tile * kTileVectors - std::max<Index>(tile - full, 0);
    return {begin * simd::kLanes<Scalar>, tile < full ? kTileVectors : kTileVectors - 1};
  }

  Index packets, tiles;
};

/// Groups of neighbouring lane tiles: a task works on the tiles of a group side by side, so that they share what is
/// read from memory. Depends on the shape alone, never on the number of workers, because sums depend on it.
template <class Scalar>
class LaneGroups {
 public:
  /// Lanes of a group: 192 floats.
  static constexpr Index kMost = 768 / (LaneTiling<Scalar>::kWidth * sizeof(Scalar));
  /// Tiles whose operands of `dims` features altogether (D + Dv) fit into the workspace.
  static Index most(Index dims) { return dims <= 256 ? kMost : (kMost + 1) / 2; }

  /// Few heads have smaller groups, for several workers to share.
  LaneGroups(Index length, Index heads, Index dims) : tiles_(LaneTiling<Scalar>(length).tiles) {
    const Index limit = heads >= 16 ? most(dims) : std::clamp<Index>(tiles_ / 8, 1, most(dims));
    count_ = (tiles_ + limit - 1) / limit;
    size_ = count_ == 0 ? 0 : (tiles_ + count_ - 1) / count_;
  }
  Index count() const { return count_; }
  Index first_tile(Index group) const { return group * size_; }
  Index tiles(Index group) const { return std::clamp<Index>(tiles_ - group * size_, 0, size_); }

 private:
  Index tiles_, size_, count_;
};

/// Ways to bring values into lanes: what becomes of the value before and the value that comes.
template <class Scalar>
struct Times {  // factor·x
  Scalar factor;
  template <class T>
  EIGEN_ALWAYS_INLINE T operator()(T, T x) const {
    if constexpr (std::is_same_v<T, Scalar>) {
      return factor * x;
    } else {
      return simd::pmul(x, simd::broadcast(factor));
    }
  }
};
template <class Scalar>
struct TimesPlus {  // factor·before + x
  Scalar factor;
  template <class T>
  EIGEN_ALWAYS_INLINE T operator()(T before, T x) const {
    if constexpr (std::is_same_v<T, Scalar>) {
      return factor * before + x;
    } else {
      return simd::pmadd(before, simd::broadcast(factor), x);
    }
  }
};

/// to[d][i] = op(to[d][i], x(i,d)): the rows of x fill the lanes. Other lanes are left alone.
template <class Scalar, class Op>
void pack_lanes(Scalar* to, Index width, MatrixView<const Scalar> x, Op op) {
  constexpr Index N = simd::kLanes<Scalar>;
  const auto put = [&](Scalar * at, simd::Packet<Scalar> y) __attribute__((always_inline)) {
    simd::store(at, op(simd::load(at), y));
  };
  Index i = 0;
  for (; i + N <= x.rows; i += N) {
    Index d = 0;
    if (x.row_stride == 1 || x.row_stride == 0) {
      for (; d < x.cols; ++d) {
        put(to + d * width + i, x.row_stride == 1 ? simd::load(&x(i, d)) : simd::broadcast(x(i, d)));
      }
    } else if (x.col_stride == 1) {
      for (; d + N <= x.cols; d += N) {
        simd::Packet<Scalar> block[N];
        for (Index r = 0; r < N; ++r) block[r] = simd::load(&x(i + r, d));
        simd::transpose<Scalar>(block);
        for (Index c = 0; c < N; ++c) put(to + (d + c) * width + i, block[c]);
      }
    }
    for (; d < x.cols; ++d) {
      for (Index r = i; r < i + N; ++r) to[d * width + r] = op(to[d * width + r], x(r, d));
    }
  }
  for (; i < x.rows; ++i) {
    for (Index d = 0; d < x.cols; ++d) to[d * width + i] = op(to[d * width + i], x(i, d));
  }
}

/// y(i,d) = from[d][i]·factor[i] for i < y.rows: undoes pack_lanes.
template <class Scalar>
void unpack_lanes(MatrixView<Scalar> y, const Scalar* from, Index width, const Scalar* factor) {
  constexpr Index N = simd::kLanes<Scalar>;
  Index i = 0;
  for (; i + N <= y.rows; i += N) {
    const simd::Packet<Scalar> factors = simd::load(factor + i);
    Index d = 0;
    if (y.row_stride == 1) {
      for (; d < y.cols; ++d) simd::store(&y(i, d), simd::pmul(simd::load(from + d * width + i), factors));
    } else if (y.col_stride == 1) {
      for (; d + N <= y.cols; d += N) {
        simd::Packet<Scalar> block[N];
        for (Index c = 0; c < N; ++c) block[c] = simd::pmul(simd::load(from + (d + c) * width + i), factors);
        simd::transpose<Scalar>(block);
        for (Index r = 0; r < N; ++r) simd::store(&y(i + r, d), block[r]);
      }
    }
    for (; d < y.cols; ++d) {
      for (Index r = i; r < i + N; ++r) y(r, d) = from[d * width + r] * factor[r];
    }
  }
  for (; i < y.rows; ++i) {
    for (Index d = 0; d < y.cols; ++d) y(i, d) = from[d * width + i] * factor[i];
  }
}

}  // namespace headroom::inline v0::core::detail
