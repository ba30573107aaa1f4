#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

/// Questions about a number, answered by its bits. Under -ffast-math the standard library's are left out: there are no
/// infinities and NaNs then, as far as the compiler knows.
namespace headroom::inline v0::core::detail {

/// Whether x is neither infinite nor NaN.
template <class Scalar>
bool is_finite(Scalar x) {
  using Bits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
  constexpr Bits exponent = sizeof(Scalar) == 4 ? Bits(0x7f800000U) : static_cast<Bits>(0x7ff0000000000000ULL);
  return (std::bit_cast<Bits>(x) & exponent) != exponent;
}
/// Whether x is 0; a NaN is not.
template <class Scalar>
bool is_zero(Scalar x) {
  using Bits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
  return static_cast<Bits>(std::bit_cast<Bits>(x) << 1) == 0;
}

}  // namespace headroom::inline v0::core::detail
