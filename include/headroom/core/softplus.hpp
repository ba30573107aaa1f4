#pragma once

#include "headroom/core/simd.hpp"

/// softplus(x) = log(1 + e^x) and its derivative, the sigmoid, on vectors. From 20 on they are x and 1, as LibTorch has
/// them. Relative error of a few roundings, for x far below 0 too; NaN stays.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// e^-|x|
template <class Scalar>
EIGEN_ALWAYS_INLINE simd::Packet<Scalar> exp_of_minus_size(simd::Packet<Scalar> x) {
  using simd::broadcast;
  constexpr double kWhole = static_cast<double>(static_cast<Scalar>(1.4426950408889634));
  constexpr double kRest = sizeof(Scalar) == 4 ? 1.4426950408889634 - kWhole : 2.0355273740931033e-17;
  const simd::Packet<Scalar> size = Eigen::internal::pabs(x), zero = broadcast(Scalar(0));
  const simd::Packet<Scalar> power = simd::pmul(size, broadcast(static_cast<Scalar>(-kWhole)));
  // What rounding took from the product: power - rest is -|x|·log2(e)
  simd::Packet<Scalar> rest = zero;
  if constexpr (simd::kFusedMultiplyAdd) rest = simd::pmadd(size, broadcast(static_cast<Scalar>(kWhole)), power);
  rest = simd::pmadd(size, broadcast(static_cast<Scalar>(kRest)), rest);
  return simd::exp2<Scalar>(power, simd::pselect(simd::pcmp_lt(size, broadcast(Scalar(32))), rest, zero));
}

/// softplus(x) where `power` is exp_of_minus_size(x).
template <class Scalar>
EIGEN_ALWAYS_INLINE simd::Packet<Scalar> softplus(simd::Packet<Scalar> x, simd::Packet<Scalar> power) {
  using simd::broadcast;
  using P = simd::Packet<Scalar>;
  const P zero = broadcast(Scalar(0));
  // log(1 + e) = 2·artanh(s) with s = e / (2 + e), at most 1/3: Taylor, s^(2k+1) / (2k+1)
  const P s = Eigen::internal::pdiv(power, simd::padd(broadcast(Scalar(2)), power)), square = simd::pmul(s, s);
  P series;
  if constexpr (sizeof(Scalar) == 4) {
    series = simd::polynomial<Scalar>(square, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0);
  } else {
    series = simd::polynomial<Scalar>(square, 1.0 / 31, 1.0 / 29, 1.0 / 27, 1.0 / 25, 1.0 / 23, 1.0 / 21, 1.0 / 19,
                                      1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0);
  }
  const P result = simd::pmadd(simd::padd(s, s), series, simd::at_least(x, zero));
  return simd::pselect(simd::pcmp_lt(broadcast(Scalar(20)), x), x, result);
}

/// Its derivative, likewise.
template <class Scalar>
EIGEN_ALWAYS_INLINE simd::Packet<Scalar> sigmoid(simd::Packet<Scalar> x, simd::Packet<Scalar> power) {
  using simd::broadcast;
  using P = simd::Packet<Scalar>;
  const P one = broadcast(Scalar(1));
  const P above = simd::pselect(simd::pcmp_lt(x, broadcast(Scalar(0))), power, one);
  return simd::pselect(simd::pcmp_lt(broadcast(Scalar(20)), x), one,
                       Eigen::internal::pdiv(above, simd::padd(one, power)));
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
