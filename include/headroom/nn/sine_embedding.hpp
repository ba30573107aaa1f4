#pragma once

#include <torch/types.h>

#include <cmath>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "headroom/nn/rotary.hpp"

// Positions as sines and cosines of many periods, in the two orders of demucs (Rouard et al. 2023, arXiv:2211.08553).
namespace headroom::inline v0::nn {

namespace detail {

inline void check_sine_embedding(int64_t dim, double max_period) {
  require(dim > 0 && dim % 4 == 0 && max_period > 1, "headroom.nn.sine_embedding.dim", "the width is ", dim,
          " and the longest period ", max_period, "; expected a width that 4 divides and a period above 1");
}

}  // namespace detail

/// Positions on a line: [length, dim], the cosines of l·max_period^(-i/(dim/2-1)) and behind them the sines. Angles are
/// computed in double. Throws headroom.nn.sine_embedding.dim.
inline torch::Tensor sine_embedding(int64_t length, int64_t dim, double max_period,
                                    const torch::TensorOptions& options = {}) {
  detail::check_sine_embedding(dim, max_period);
  const auto wide = options.dtype(torch::kDouble).requires_grad(false);
  const double step = -std::log(max_period) / static_cast<double>(dim / 2 - 1);
  const torch::Tensor phase = detail::angles(length, torch::exp(torch::arange(dim / 2, wide) * step));  // [L,dim/2]
  return torch::cat({phase.cos(), phase.sin()}, -1).to(options);
}

/// Positions on a grid: [rows, columns, dim]. The first half of the features tells the row, the other half the column:
/// the sine and cosine of l·max_period^(-2i/(dim/2)) in turn. Throws headroom.nn.sine_embedding.dim.
inline torch::Tensor sine_embedding_2d(int64_t rows, int64_t columns, int64_t dim, double max_period,
                                       const torch::TensorOptions& options = {}) {
  detail::check_sine_embedding(dim, max_period);
  const auto wide = options.dtype(torch::kDouble).requires_grad(false);
  const int64_t half = dim / 2;
  const torch::Tensor frequencies =
      torch::exp(torch::arange(0, half, 2, wide) * (-std::log(max_period) / static_cast<double>(half)));
  const auto along = [&](int64_t length) {
    const torch::Tensor phase = detail::angles(length, frequencies);
    return torch::stack({phase.sin(), phase.cos()}, -1).flatten(1).to(options);  // [length,half]
  };
  return torch::cat({along(rows).unsqueeze(1).expand({rows, columns, half}),
                     along(columns).unsqueeze(0).expand({rows, columns, half})},
                    -1);
}

}  // namespace headroom::inline v0::nn
