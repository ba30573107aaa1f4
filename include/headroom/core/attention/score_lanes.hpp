#pragma once

#include <numbers>
#include <type_traits>

#include "headroom/core/simd.hpp"
#include "headroom/core/view.hpp"

// GCC warns that a vector type as template argument loses its alignment attribute: never used that way here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// Numbers that score and mask functions compute with. They look like one number and are one for each lane of a vector
/// register, as many (query, key) pairs at a time.
namespace headroom::inline v0::core::inline HEADROOM_ISA {

template <class Scalar>
struct Lanes;

/// Yes or no in each lane.
template <class Scalar>
struct LaneMask {
  simd::Packet<Scalar> bits;  // all of a lane's, or none

  friend EIGEN_ALWAYS_INLINE LaneMask operator&&(LaneMask a, LaneMask b) { return {simd::pand(a.bits, b.bits)}; }
  friend EIGEN_ALWAYS_INLINE LaneMask operator||(LaneMask a, LaneMask b) {
    return {Eigen::internal::por(a.bits, b.bits)};
  }
  friend EIGEN_ALWAYS_INLINE LaneMask operator!(LaneMask a) {
    return {Eigen::internal::pxor(a.bits, Eigen::internal::ptrue(a.bits))};
  }
  friend EIGEN_ALWAYS_INLINE bool any(LaneMask a) {
    if constexpr (std::is_same_v<Scalar, float>) return Eigen::internal::predux_any(a.bits);
    return Eigen::internal::predux_max(simd::pand(a.bits, simd::broadcast(Scalar(1)))) > Scalar(0);
  }
  /// a where the mask says yes, b elsewhere.
  friend EIGEN_ALWAYS_INLINE Lanes<Scalar> where(LaneMask mask, Lanes<Scalar> a, Lanes<Scalar> b) {
    return simd::pselect(mask.bits, a.packet, b.packet);
  }
};

/// A number in each lane; plain numbers become the same one in all.
template <class Scalar>
struct Lanes {
  using Packet = simd::Packet<Scalar>;

  Packet packet;

  EIGEN_ALWAYS_INLINE Lanes(Packet p) : packet(p) {}
  template <class Number>
  requires std::is_arithmetic_v<Number> EIGEN_ALWAYS_INLINE Lanes(Number x)
      : packet(simd::broadcast(static_cast<Scalar>(x))) {}

  friend EIGEN_ALWAYS_INLINE Lanes operator+(Lanes a, Lanes b) { return simd::padd(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes operator-(Lanes a, Lanes b) { return simd::psub(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes operator*(Lanes a, Lanes b) { return simd::pmul(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes operator/(Lanes a, Lanes b) { return Eigen::internal::pdiv(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes operator-(Lanes a) { return Lanes(0) - a; }

  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator<(Lanes a, Lanes b) {
    return {simd::pcmp_lt(a.packet, b.packet)};
  }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator<=(Lanes a, Lanes b) {
    return {simd::pcmp_le(a.packet, b.packet)};
  }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator==(Lanes a, Lanes b) {
    return {simd::pcmp_eq(a.packet, b.packet)};
  }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator>(Lanes a, Lanes b) { return b < a; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator>=(Lanes a, Lanes b) { return b <= a; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator!=(Lanes a, Lanes b) { return !(a == b); }

  friend EIGEN_ALWAYS_INLINE Lanes abs(Lanes a) { return Eigen::internal::pabs(a.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes min(Lanes a, Lanes b) { return Eigen::internal::pmin(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes max(Lanes a, Lanes b) { return simd::pmax(a.packet, b.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes floor(Lanes a) { return Eigen::internal::pfloor(a.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes sqrt(Lanes a) { return Eigen::internal::psqrt(a.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes log(Lanes a) { return Eigen::internal::plog(a.packet); }
  friend EIGEN_ALWAYS_INLINE Lanes tanh(Lanes a) { return simd::tanh<Scalar>(a.packet); }
  /// Saturates at 2^127, in double at 2^1023.
  friend EIGEN_ALWAYS_INLINE Lanes exp(Lanes a) {
    return simd::exp2<Scalar>(min(a * std::numbers::log2e, std::is_same_v<Scalar, float> ? 127 : 1023).packet);
  }
};

/// A number and its derivative with respect to one other: what is computed with it carries the derivative along
/// (forward-mode differentiation).
template <class Scalar>
struct Dual {
  using Value = Lanes<Scalar>;

  Value value, slope;

  EIGEN_ALWAYS_INLINE Dual(Value v, Value s = 0) : value(v), slope(s) {}
  template <class Number>
  requires std::is_arithmetic_v<Number> EIGEN_ALWAYS_INLINE Dual(Number x) : value(x), slope(0) {}

  friend EIGEN_ALWAYS_INLINE Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
  friend EIGEN_ALWAYS_INLINE Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.slope - b.slope}; }
  friend EIGEN_ALWAYS_INLINE Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.slope * b.value + a.value * b.slope};
  }
  friend EIGEN_ALWAYS_INLINE Dual operator/(Dual a, Dual b) {
    const Value quotient = a.value / b.value;
    return {quotient, (a.slope - quotient * b.slope) / b.value};
  }
  friend EIGEN_ALWAYS_INLINE Dual operator-(Dual a) { return {-a.value, -a.slope}; }

  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator<(Dual a, Dual b) { return a.value < b.value; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator<=(Dual a, Dual b) { return a.value <= b.value; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator==(Dual a, Dual b) { return a.value == b.value; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator>(Dual a, Dual b) { return a.value > b.value; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator>=(Dual a, Dual b) { return a.value >= b.value; }
  friend EIGEN_ALWAYS_INLINE LaneMask<Scalar> operator!=(Dual a, Dual b) { return a.value != b.value; }

  friend EIGEN_ALWAYS_INLINE Dual where(LaneMask<Scalar> mask, Dual a, Dual b) {
    return {where(mask, a.value, b.value), where(mask, a.slope, b.slope)};
  }
  friend EIGEN_ALWAYS_INLINE Dual min(Dual a, Dual b) { return where(b < a, b, a); }
  friend EIGEN_ALWAYS_INLINE Dual max(Dual a, Dual b) { return where(a < b, b, a); }
  friend EIGEN_ALWAYS_INLINE Dual abs(Dual a) { return where(a.value < 0, -a, a); }
  friend EIGEN_ALWAYS_INLINE Dual floor(Dual a) { return {floor(a.value)}; }
  friend EIGEN_ALWAYS_INLINE Dual sqrt(Dual a) {
    const Value root = sqrt(a.value);
    return {root, a.slope / (2 * root)};
  }
  friend EIGEN_ALWAYS_INLINE Dual log(Dual a) { return {log(a.value), a.slope / a.value}; }
  friend EIGEN_ALWAYS_INLINE Dual exp(Dual a) {
    const Value power = exp(a.value);
    return {power, power * a.slope};
  }
  friend EIGEN_ALWAYS_INLINE Dual tanh(Dual a) {
    const Value t = tanh(a.value);
    return {t, (1 - t * t) * a.slope};
  }
};

/// Where scores stand. Queries and keys count from 0 in q and k; the distance is the query's position minus the key's.
/// Whole numbers, exact below 2^24.
template <class Scalar>
struct ScorePlace {
  Index batch, head;  // the same in all lanes
  Lanes<Scalar> query, key, distance;
};

}  // namespace headroom::inline v0::core::inline HEADROOM_ISA

#pragma GCC diagnostic pop
