#pragma once

#include <ATen/Parallel.h>
#include <torch/types.h>

#include <algorithm>

#include "headroom/core/lanes.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/operator.hpp"

namespace headroom::inline v0::nn::detail {

using core::Index;

/// View of a tensor [rows, cols] of floats, any strides.
template <class Scalar>
core::MatrixView<Scalar> matrix_of(const torch::Tensor& x) {
  return {static_cast<Scalar*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

/// The right operand b [k,n] of a product as the register tile reads it: columns in vector lanes. Read where it lies
/// when its rows are whole vectors, else from a copy in which zeros fill the last one.
class PackedB {
 public:
  explicit PackedB(const torch::Tensor& b) : b_(b), lanes_(b.size(1)) {}

  const torch::Tensor& tensor() const { return b_; }
  const core::detail::LaneTiling<float>& lanes() const { return lanes_; }
  /// Must be called before several threads read tiles.
  void pack() {
    if (copy_.defined() || (b_.stride(1) == 1 && b_.size(1) % core::simd::kLanes<float> == 0)) return;
    const Index depth = b_.size(0);
    copy_ = headroom::detail::workspace_tensor(lanes_.packets * core::simd::kLanes<float> * depth,
                                               b_.options().requires_grad(false));
    if (is_dry(b_)) return;
    const auto view = matrix_of<const float>(b_);
    for (Index t = 0; t < lanes_.tiles; ++t) {
      const auto tile = lanes_[t];
      const core::MatrixView<const float> lanes_first{&view(0, tile.begin),
                                                      std::min<Index>(tile.width(), view.cols - tile.begin), depth,
                                                      view.col_stride, view.row_stride};
      float* const to = copy_.data_ptr<float>() + tile.begin * depth;
      if (lanes_first.rows < tile.width()) std::fill_n(to, depth * tile.width(), 0.0F);
      core::detail::pack_lanes(to, tile.width(), lanes_first, core::detail::Times<float>{1});
    }
  }
  /// The lanes of one tile: their first element, the step from one row to the next, and their first column.
  struct Lanes {
    const float* data;
    Index stride, begin;
  };
  Lanes tile(const core::detail::LaneTiling<float>::Tile& tile) const {
    if (copy_.defined()) return {copy_.const_data_ptr<float>() + tile.begin * b_.size(0), tile.width(), tile.begin};
    return {b_.const_data_ptr<float>() + tile.begin, b_.stride(0), tile.begin};
  }

 private:
  torch::Tensor b_, copy_;
  core::detail::LaneTiling<float> lanes_;
};

/// What a product is added to: with c, beta is 1 in the terms of BLAS.
enum class AddTo { nothing, bias, c };

/// c(:, lanes of one tile) = start + a·b, on one thread. Accumulates 256 terms at a time.
template <int Vectors>
void multiply_lanes(core::MatrixView<const float> a, const PackedB::Lanes& b, core::MatrixView<float> c, AddTo start,
                    const float* bias) {
  using core::simd::Packet;
  constexpr Index kLanes = core::simd::kLanes<float>, kDepth = 256;
  const Index columns = std::min<Index>(Vectors * kLanes, c.cols - b.begin);
  for (Index first = 0; first < a.cols || first == 0; first += kDepth) {
    const Index depth = std::min(kDepth, a.cols - first);
    const bool adds_bias = start == AddTo::bias && first == 0;
    const bool adds = adds_bias || start == AddTo::c || first > 0;
    core::detail::for_row_tiles<core::detail::kTileRows>(a.rows, [&]<int Rows>(Index row) {
      core::detail::RegisterTile<float, Rows, Vectors> tile({&a(row, first), a.row_stride, a.col_stride},
                                                            {b.data + first * b.stride, b.stride}, depth);
      float* const to = &c(row, b.begin);
      const float* const from = adds_bias ? bias + b.begin : to;
      const Index from_stride = adds_bias ? 0 : c.row_stride;
      if (columns < Vectors * kLanes) {  // the last tile of a width that is not whole vectors
        float sums[Rows][Vectors * kLanes];
        tile.for_each([&](int r, int v, const Packet<float>& sum)
                          __attribute__((always_inline)) { core::simd::store(&sums[r][v * kLanes], sum); });
        for (Index r = 0; r < Rows; ++r) {
          for (Index j = 0; j < columns; ++j) {
            to[r * c.row_stride + j] = adds ? from[r * from_stride + j] + sums[r][j] : sums[r][j];
          }
        }
      } else if (adds) {
        tile.for_each([&](int r, int v, const Packet<float>& sum) __attribute__((always_inline)) {
          core::simd::store(to + r * c.row_stride + v * kLanes,
                            core::simd::padd(core::simd::load(from + r * from_stride + v * kLanes), sum));
        });
      } else {
        tile.for_each([&](int r, int v, const Packet<float>& sum) __attribute__((always_inline)) {
          core::simd::store(to + r * c.row_stride + v * kLanes, sum);
        });
      }
    });
  }
}

/// c = start + a·b, c [m,n] row-major, by the register tile. The result does not depend on the number of threads: a
/// task computes its part of c whole.
inline void multiply_tiled(const torch::Tensor& a, PackedB& b, const torch::Tensor& c, AddTo start,
                           const torch::Tensor& bias) {
  constexpr Index kTileRows = core::detail::kTileRows;
  b.pack();
  if (is_dry(a)) return;
  const auto left = matrix_of<const float>(a);
  const auto result = matrix_of<float>(c);
  const float* const bias_data = start == AddTo::bias ? bias.const_data_ptr<float>() : nullptr;
  // A task is 8 tiles high, which reuses the lanes of b, less when there are too few rows for all threads.
  const Index row_tiles = (left.rows + kTileRows - 1) / kTileRows;
  const Index height = kTileRows * std::clamp<Index>(row_tiles / (Index{4} * at::get_num_threads()), 1, 8);
  const Index row_tasks = (left.rows + height - 1) / height;
  constexpr Index kWorthAThread = 1 << 17;  // multiplications, some microseconds
  const Index grain = std::max<Index>(1, kWorthAThread / (height * b.lanes().kWidth * std::max<Index>(left.cols, 1)));
  at::parallel_for(0, row_tasks * b.lanes().tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const Index row = task / b.lanes().tiles * height, rows = std::min(height, left.rows - row);
      const auto tile = b.lanes()[task % b.lanes().tiles];
      const auto run = [&]<int Vectors>() {
        multiply_lanes<Vectors>(left.middle_rows(row, rows), b.tile(tile), result.middle_rows(row, rows), start,
                                bias_data);
      };
      static_assert(core::detail::kTileVectors <= 3);
      if (tile.vectors == 1) run.template operator()<1>();
      if (tile.vectors == 2) run.template operator()<2>();
      if constexpr (core::detail::kTileVectors == 3) {
        if (tile.vectors == 3) run.template operator()<3>();
      }
    }
  });
}

/// The same by LibTorch's matrix product.
inline void multiply_aten(const torch::Tensor& a, const PackedB& b, torch::Tensor c, AddTo start,
                          const torch::Tensor& bias) {
  if (start == AddTo::nothing) {
    at::mm_out(c, a, b.tensor());
  } else {
    at::addmm_out(c, start == AddTo::bias ? bias : c, a, b.tensor());
  }
}

/// Whether the register tile computes a product with so many rows faster than LibTorch: where it was compiled for the
/// widest vectors that this processor has, unless its copy of b serves too few rows. It depends on nothing but the
/// shape and the machine and is never measured while running, because the two sum in different orders: a choice by the
/// clock makes two processes differ in their last bits.
///
/// Measured with AVX-512 on an AMD EPYC 9004 against MKL 2024.2, the three products of linear layers of widths from 16
/// to 1536: the tile takes 0.36 to 1.0 times as long, 0.86 in the middle; up to 1.17 times for gradients of weights of
/// more than 768 x 768. Products too small for the cost to show take 0.3 to 1.2 times as long.
inline bool tile_wins(Index rows) {
  if constexpr (!core::simd::kFusedMultiplyAdd) {
    return false;  // LibTorch has kernels for every processor
  } else {
#if defined(__x86_64__)
    if (core::simd::kLanes<float> < 16 && __builtin_cpu_supports("avx512f")) return false;
#endif
    return rows >= core::detail::kTileRows;
  }
}

/// c = start + a·b by who is faster on this machine; a [m,k], b [k,n], c [m,n] row-major, bias [n], all float on the
/// CPU.
inline void multiply(const torch::Tensor& a, PackedB& b, const torch::Tensor& c, AddTo start,
                     const torch::Tensor& bias = {}) {
  tile_wins(a.size(0)) ? multiply_tiled(a, b, c, start, bias) : multiply_aten(a, b, c, start, bias);
}

}  // namespace headroom::inline v0::nn::detail
