#pragma once

#include <torch/types.h>

#include <bit>

#include "headroom/core/dropout.hpp"

namespace headroom::inline v0::detail {

/// core::Dropout by ATen operators, on any device: 32-bit patterns in kInt, whose products wrap as unsigned ones do.
struct DropoutMask {
  static torch::Scalar pattern(std::uint32_t bits) { return std::bit_cast<std::int32_t>(bits); }

  /// x >> shift with zeros from the left.
  static torch::Tensor shifted(const torch::Tensor& x, int shift) {
    return x.bitwise_right_shift(torch::Scalar(shift)).bitwise_and_(pattern(0xffffffffU >> shift));
  }
  static torch::Tensor& mix_(torch::Tensor& x) {
    x.bitwise_xor_(shifted(x, 16)).mul_(pattern(0x7feb352dU));
    x.bitwise_xor_(shifted(x, 15)).mul_(pattern(0x846ca68bU));
    return x.bitwise_xor_(shifted(x, 16));
  }
  /// int64 -> its lowest 32 bits
  static torch::Tensor low_bits(const torch::Tensor& x) { return x.bitwise_and(int64_t{0xffffffff}).to(torch::kInt); }

  /// bool [heads..., Lq, Lk], true where a weight is kept. int64 `heads` (flat indices, any shape), `queries` [Lq] and
  /// `keys` [Lk] on one device.
  static torch::Tensor kept(const core::Dropout& dropout, const torch::Tensor& heads, const torch::Tensor& queries,
                            const torch::Tensor& keys) {
    const auto low = static_cast<std::uint32_t>(dropout.seed), high = static_cast<std::uint32_t>(dropout.seed >> 32);
    torch::Tensor row = low_bits(heads).add_(pattern(low));
    row = mix_(row).bitwise_xor_(pattern(high));
    row = mix_(row).unsqueeze(-1) + low_bits(queries);
    torch::Tensor bits = mix_(row).unsqueeze(-1) + low_bits(keys).mul_(pattern(0x9e3779b9U));  // [heads...,Lq,Lk]
    // Unsigned order is signed order with the highest bit flipped
    return mix_(bits).bitwise_xor_(pattern(0x80000000U)).ge(pattern(dropout.threshold() ^ 0x80000000U));
  }
};

}  // namespace headroom::inline v0::detail
