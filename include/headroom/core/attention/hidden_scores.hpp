#pragma once

#include <limits>

#include "headroom/core/simd.hpp"

/// How scores that are hidden are told from those that are seen, without infinities, so that it works under
/// -ffast-math.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// A hidden score: below every finite score that is seen, because those of the same value are lifted to kLeast, the
/// next number above it. Numbers of this size are so far apart that any weight relative to a visible maximum is exactly
/// 0.
template <class Scalar>
inline constexpr Scalar kHidden = std::numeric_limits<Scalar>::lowest();
template <class Scalar>
inline constexpr Scalar kLeast = kHidden<Scalar>*(1 - std::numeric_limits<Scalar>::epsilon() / 2);

/// A score that is seen.
template <class Scalar>
EIGEN_ALWAYS_INLINE simd::Packet<Scalar> lifted(const simd::Packet<Scalar>& s) {
  return simd::pselect(simd::pcmp_eq(s, simd::broadcast(kHidden<Scalar>)), simd::broadcast(kLeast<Scalar>), s);
}

/// The product of x and something, 0 where x is: 0·NaN is NaN, and what is hidden has no gradient, whatever it holds.
template <class P>
EIGEN_ALWAYS_INLINE P unless_zero(const P& x, const P& product) {
  const P zero = Eigen::internal::pzero(x);
  return simd::pselect(simd::pcmp_eq(x, zero), zero, product);
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
