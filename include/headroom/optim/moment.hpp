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
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::optim {

/// How an optimizer stores a running average: in float, in double for a double parameter; in bfloat16, 2 bytes an
/// element; or in 8 bits and a scale for each block of kMomentBlock elements.
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
/// A tensor with fewer elements stays full: it saves next to nothing and is often a norm, which is delicate.
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

/// The values that 8-bit codes stand for on one device, and what lies between neighbours. Averages of gradients have
/// the signed dynamic values; averages of squares have the squares of those without a sign, so that what a step divides
/// by, the root, reaches as far down as what it divides.
struct DynamicCode {
  at::Tensor values;  ///< float [256], rising
  at::Tensor inner;   ///< float [255]: of two neighbours the one that is nearer to zero
  at::Tensor widths;  ///< float [255]: from there to the other one
  bool is_signed;

  DynamicCode(bool has_sign, const at::Tensor& like) : is_signed(has_sign) {
    std::array<float, 256> numbers = detail::dynamic_values(is_signed);
    if (!is_signed) {
      for (float& x : numbers) x *= x;
    }
    std::vector<float> nearer(255), between(255);
    for (size_t i = 0; i < nearer.size(); ++i) {
      const bool below_zero = numbers[i] < 0;
      nearer[i] = numbers[below_zero ? i + 1 : i];
      between[i] = numbers[below_zero ? i : i + 1] - nearer[i];
    }
    // A square that is not zero stays so: the step divides by its root
    if (!is_signed) between[0] = 0;
    values = detail::table_for({numbers.begin(), numbers.end()}, like);
    inner = detail::table_for(nearer, like);
    widths = detail::table_for(between, like);
  }
};

/// Where between two codes a step rounds away from zero from: 0 to 1, evenly spread over the steps (a Weyl sequence),
/// so that an average that changes by less than codes are apart does change in the mean over many steps.
inline double rounding_position(int64_t step) {
  const double turns = (static_cast<double>(step) + 0.5) * (std::sqrt(2.0) - 1);
  return turns - std::floor(turns);
}

/// A running average as it is stored.
struct StoredMoment {
  at::Tensor values;  ///< of the parameter's shape, float, double or bfloat16; or codes, uint8 [blocks, kMomentBlock]
  at::Tensor scales;  ///< of codes, float [blocks]; undefined in other formats
  bool is_signed = true;  ///< which values codes stand for, see DynamicCode

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

/// Codes for `x` (float, contiguous) and a scale for each block, the greatest magnitude in it. An element gets one of
/// the two values of `code` times the scale that it lies between: the one away from zero from `position` of the way on,
/// 0.5 gives the nearest. Elements that are not finite count as 0, so that they spoil no others.
inline StoredMoment quantise(const at::Tensor& x, const DynamicCode& code, double position = 0.5) {
  const int64_t padding = (kMomentBlock - x.numel() % kMomentBlock) % kMomentBlock;
  const at::Tensor flat = x.view({-1});
  at::Tensor finite = padding > 0 ? at::constant_pad_nd(flat, {0, padding}).nan_to_num_(0.0, 0.0, 0.0)
                                  : at::nan_to_num(flat, 0.0, 0.0, 0.0);
  const at::Tensor parts = finite.view({-1, kMomentBlock});                         // [blocks, 256]
  at::Tensor scales = at::linalg_vector_norm(parts, INFINITY, at::IntArrayRef{1});  // [blocks]
  parts.div_(scales.clamp_min_(1e-37).unsqueeze(1));                                // in [-1, 1]
  const at::Tensor limits = at::add(code.inner, code.widths, position);             // [255]
  return {at::bucketize(parts, limits, /*out_int32=*/true).to(at::kByte), std::move(scales), code.is_signed};
}

/// Undoes quantise() up to its rounding; float of the given sizes.
inline at::Tensor dequantise(const StoredMoment& moment, const DynamicCode& code, at::IntArrayRef sizes) {
  const at::Tensor flat = code.values.index_select(0, moment.values.view({-1}).to(at::kInt));
  flat.view({-1, kMomentBlock}).mul_(moment.scales.unsqueeze(1));
  return flat.slice(0, 0, c10::multiply_integers(sizes)).view(sizes);
}

}  // namespace headroom::inline v0::optim
