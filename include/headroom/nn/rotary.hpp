#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cmath>

#include "headroom/attention/rotation.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::nn {

namespace detail {

/// Angles of each position: double [length, n], element (l, i) is l·frequencies[i].
inline torch::Tensor angles(int64_t length, const torch::Tensor& frequencies) {
  const torch::Tensor wide = frequencies.to(torch::kDouble);
  return torch::outer(torch::arange(length, wide.options()), wide);
}

/// Rotations by these angles: complex double [length, pairs].
inline torch::Tensor rotations(int64_t length, const torch::Tensor& frequencies) {
  const torch::Tensor phase = angles(length, frequencies);
  return torch::polar(torch::ones_like(phase), phase);
}

/// Cosines and sines of these angles: double [length, 2n].
inline torch::Tensor polar_turns(int64_t length, const torch::Tensor& frequencies) {
  const torch::Tensor phase = angles(length, frequencies);
  return torch::cat({phase.cos(), phase.sin()}, -1);
}

}  // namespace detail

/// Rotations of rotary position embedding (Su et al. 2021): complex [length, dim / 2], element (l, i) is
/// exp(j·l·theta^(-2i/dim)). dim must be even.
inline torch::Tensor rotary_table(int64_t length, int64_t dim, double theta = 10000.0,
                                  torch::Device device = torch::kCPU) {
  require(dim > 0 && dim % 2 == 0, "headroom.nn.rotary.dim",
          "rotary embedding rotates pairs of features, the head dim is ", dim, "; choose an even head dim");
  const auto real = torch::TensorOptions(torch::kDouble).device(device);
  const torch::Tensor frequencies =
      torch::exp(torch::arange(0, dim, 2, real) * (-std::log(theta) / static_cast<double>(dim)));
  return detail::rotations(length, frequencies).to(torch::kComplexFloat);
}

/// Turns of polar position embedding (PoPE; Gopalakrishnan et al. 2025): [length, 2·dim], in row l the cosines and then
/// the sines of l·theta^(-i/dim).
inline torch::Tensor polar_table(int64_t length, int64_t dim, double theta = 10000.0,
                                 torch::Device device = torch::kCPU) {
  const auto real = torch::TensorOptions(torch::kDouble).device(device);
  const torch::Tensor frequencies =
      torch::exp(torch::arange(0, dim, real) * (-std::log(theta) / static_cast<double>(std::max<int64_t>(dim, 1))));
  return detail::polar_turns(length, frequencies).to(torch::kFloat);
}

/// Rotates neighbouring pairs of features of x [..., L, D] by the table [L, D/2]; differentiable, keeps x's dtype.
inline torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& table) {
  require(x.dim() >= 2 && x.size(-2) == table.size(0) && x.size(-1) == 2 * table.size(1), "headroom.nn.rotary.shape",
          "x is ", x.sizes(), " and the table ", table.sizes(), "; expected x [...,L,D] and a table [L,D/2]");
  return headroom::detail::turned(x, table);
}

}  // namespace headroom::inline v0::nn
