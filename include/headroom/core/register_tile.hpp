#pragma once

#include <algorithm>
#include <utility>

#include "headroom/core/simd.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

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

  /// a(r,k) = data[r·row_stride + k·depth_stride].
  struct Left {
    const Scalar* data;
    Index row_stride, depth_stride;
  };
  /// b(k,:) = data[k·depth_stride …].
  struct Right {
    const Scalar* data;
    Index depth_stride;
  };

  EIGEN_ALWAYS_INLINE RegisterTile(const Left& left, const Right& right, Index depth) {
    const Scalar *a = left.data, *b = right.data;
    const Index a_row = left.row_stride, a_depth = left.depth_stride, b_depth = right.depth_stride;
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
  for (; count - row >= Index{2} * Max || count - row == Max; row += Max) f.template operator()<Max>(row);
  while (row < count) {
    const Index rows = count - row > Max ? (count - row + 1) / 2 : count - row;
    with_count<Max>(
        rows, [&]<int Rows>() __attribute__((always_inline)) { f.template operator()<Rows>(row); });
    row += rows;
  }
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
