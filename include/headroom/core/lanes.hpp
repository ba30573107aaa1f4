#pragma once

#include "headroom/core/register_tile.hpp"

/// How positions come into vector lanes and back.
///
/// A lane is one number of a vector register. A lane tile is up to kTileVectors registers side by side, each lane a
/// position of the sequence; in memory it is a matrix [features][width], a row for each feature.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

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

/// No instruction set has wider tiles: 3 vectors of 64 bytes.
inline constexpr Index kWidestTile = 48;
static_assert(LaneTiling<float>::kWidth <= kWidestTile);

/// Positions in lanes: [features][width].
template <class Scalar>
struct LaneMatrix {
  Scalar* data;
  Index width;
};

/// Ways to bring values into lanes: what becomes of the value before and the value that comes. Whether it overwrites
/// the former.
template <class Scalar>
struct Times {  // factor·x
  static constexpr bool kOverwrites = true;
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
  static constexpr bool kOverwrites = false;
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

/// Where `size` of `count` positions begin that hold `next` and those behind it: a vector of the last ones is filled up
/// with some that have been before.
inline Index whole_vector(Index next, Index count, Index size) {
  return std::max<Index>(std::min(next, count - size), 0);
}

/// to[d][i] = op(to[d][i], x(i,d)): the rows of x fill the lanes. Other lanes are left alone.
// Flattened, as its counterpart: a transposition of Eigen's that stays a function has the same name in every unit
template <class Scalar, class Op>
__attribute__((flatten)) void pack_lanes(Scalar* to, Index width, MatrixView<const Scalar> x, Op op) {
  constexpr Index N = simd::kLanes<Scalar>;
  const auto put = [&](Scalar * at, simd::Packet<Scalar> y) __attribute__((always_inline)) {
    simd::store(at, op(simd::load(at), y));
  };
  const Index whole = Op::kOverwrites && x.rows >= N ? x.rows : x.rows / N * N;
  for (Index next = 0; next < whole; next += N) {
    const Index i = whole_vector(next, x.rows, N);
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
  for (Index i = whole; i < x.rows; ++i) {
    for (Index d = 0; d < x.cols; ++d) to[d * width + i] = op(to[d * width + i], x(i, d));
  }
}

/// y(i,d) = from[d][i]·factor[i] for i < y.rows: undoes pack_lanes.
template <class Scalar>
__attribute__((flatten)) void unpack_lanes(MatrixView<Scalar> y, const Scalar* from, Index width,
                                           const Scalar* factor) {
  constexpr Index N = simd::kLanes<Scalar>;
  const Index whole = y.rows >= N ? y.rows : 0;
  for (Index next = 0; next < whole; next += N) {
    const Index i = whole_vector(next, y.rows, N);
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
  for (Index i = whole; i < y.rows; ++i) {
    for (Index d = 0; d < y.cols; ++d) y(i, d) = from[d * width + i] * factor[i];
  }
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
