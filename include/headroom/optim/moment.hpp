#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/dry_run/device.hpp"

namespace headroom::inline v0::optim {

/// How an optimizer stores a running average: in the parameter's type; in bfloat16, 2 bytes an element; or in 8 bits
/// and a scale for each block of kMomentBlock elements.
enum class MomentFormat { full, bf16, eight_bit };
inline constexpr std::array<std::string_view, 3> kMomentFormatNames{"full", "bf16", "8bit"};

/// The format of a name of kMomentFormatNames. Throws headroom.optim.format.
inline MomentFormat moment_format(std::string_view name) {
  const auto found = std::find(kMomentFormatNames.begin(), kMomentFormatNames.end(), name);
  require(found != kMomentFormatNames.end(), "headroom.optim.format", "no format of optimizer state is called ", name,
          "; expected one of full, bf16, 8bit");
  return static_cast<MomentFormat>(found - kMomentFormatNames.begin());
}

/// Elements that share a scale. 1.6 % of memory for scales; Dettmers et al. use 2048, their library by now 256.
inline constexpr int64_t kMomentBlock = 256;
/// A tensor with fewer elements keeps its type: it saves next to nothing and is often a norm, which is delicate.
inline constexpr int64_t kSmallestEightBit = 4096;

namespace detail {

/// The 256 values of 8-bit dynamic quantisation in rising order: fractions of 0 to 6 bits (one more without a sign)
/// times 1e-6 to 1, so that both large and very small values have some. Source: Dettmers et al. 2022, arXiv:2110.02861.
inline std::array<float, 256> dynamic_values(bool is_signed) {
  std::vector<float> values{0, 1};
  for (int exponent = 0; exponent < 7; ++exponent) {
    const double power = std::pow(10.0, exponent - 6);
    const int fractions = 1 << (is_signed ? exponent : exponent + 1);
    for (int i = 0; i < fractions; ++i) {
      const double fraction = 0.1 + 0.9 * (i + 0.5) / fractions;  // the middle of the i-th part of [0.1, 1]
      values.push_back(static_cast<float>(power * fraction));
      if (is_signed) values.push_back(static_cast<float>(-power * fraction));
    }
  }
  std::array<float, 256> sorted{};
  std::copy(values.begin(), values.end(), sorted.begin());
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

/// `values` as a float tensor on the device of `x`; in a dry run one without data.
inline at::Tensor table_for(const std::vector<float>& values, const at::Tensor& x) {
  const auto count = static_cast<int64_t>(values.size());
  if (is_dry(x)) return at::empty({count}, x.options().dtype(at::kFloat));
  const at::Tensor table = at::empty({count}, at::kFloat);
  std::memcpy(table.mutable_data_ptr(), values.data(), values.size() * sizeof(float));
  return table.to(x.device());
}

}  // namespace detail

/// The values that 8-bit codes stand for, and the limits between them, on one device.
struct DynamicCode {
  at::Tensor values;  ///< float [256]
  at::Tensor limits;  ///< float [255]

  DynamicCode(bool is_signed, const at::Tensor& like) {
    const std::array<float, 256> numbers = detail::dynamic_values(is_signed);
    std::vector<float> between(255);
    for (size_t i = 0; i < between.size(); ++i) between[i] = (numbers[i] + numbers[i + 1]) / 2;
    values = detail::table_for({numbers.begin(), numbers.end()}, like);
    limits = detail::table_for(between, like);
  }
};

/// A running average as it is stored.
struct StoredMoment {
  at::Tensor values;  ///< of the parameter's shape, in its type or bfloat16; or codes, uint8 [blocks, kMomentBlock]
  at::Tensor scales;  ///< of codes, float [blocks]; undefined in other formats

  /// Takes over the numbers of a moment of the same format. Allocates nothing.
  void copy_(const StoredMoment& other) {
    if (!values.is_same(other.values)) values.copy_(other.values);
    if (scales.defined()) scales.copy_(other.scales);
  }
};

/// `x` (float) rounded to bfloat16 so that the mean over many steps is right: before the lower 16 bits are cut off, a
/// number from 0 to 65535 is added to them. Plain rounding would lose the decay of an average altogether: 0.1 % a step
/// is less than half of what bfloat16 can tell apart. The numbers are evenly spread over elements and over steps and
/// depend on nothing else (a Weyl sequence): no random generator is touched, and equal runs give equal bits. An average
/// that decays to a twentieth is off by 1.6 % then, by 10 % with random numbers.
inline at::Tensor round_to_bf16(const at::Tensor& x, int64_t step) {
  constexpr int64_t kElement = 25033, kStep = 27145;  // odd; the fractions 0.382 and 0.414 of 65536
  at::Tensor bits = at::arange(x.numel(), x.options().dtype(at::kInt));
  bits.bitwise_and_(0xFFFF).mul_(kElement).add_(step % 65536 * kStep % 65536).bitwise_and_(0xFFFF);
  bits.add_(x.view({-1}).view(at::kInt)).bitwise_and_(-65536);
  return bits.view(at::kFloat).to(at::kBFloat16).view(x.sizes());
}

/// Codes for `x` (float, contiguous) and a scale for each block, the greatest magnitude in it. An element gets the
/// nearest of the values of `code` times the scale.
inline StoredMoment quantise(const at::Tensor& x, const DynamicCode& code) {
  const int64_t padding = (kMomentBlock - x.numel() % kMomentBlock) % kMomentBlock;
  const at::Tensor flat = x.view({-1});
  const at::Tensor blocks =
      (padding > 0 ? at::constant_pad_nd(flat, {0, padding}) : flat).view({-1, kMomentBlock});  // [blocks, 256]
  at::Tensor scales = at::linalg_vector_norm(blocks, INFINITY, at::IntArrayRef{1});             // [blocks]
  const at::Tensor parts = blocks / scales.clamp_min(1e-37).unsqueeze(1);                       // in [-1, 1]
  return {at::bucketize(parts, code.limits, /*out_int32=*/true).to(at::kByte), std::move(scales)};
}

/// Undoes quantise() up to its rounding; float of the given sizes.
inline at::Tensor dequantise(const StoredMoment& moment, const DynamicCode& code, at::IntArrayRef sizes) {
  const at::Tensor flat = code.values.index_select(0, moment.values.view({-1}).to(at::kInt));
  flat.view({-1, kMomentBlock}).mul_(moment.scales.unsqueeze(1));
  return flat.slice(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

}  // namespace headroom::inline v0::optim
