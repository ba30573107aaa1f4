#pragma once

#include <Eigen/Core>
#include <cmath>
#include <type_traits>

#include "headroom/core/instruction_set.hpp"
#include "headroom/core/view.hpp"

// GCC warns that a vector type as template argument loses its alignment attribute: never used that way here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// The SIMD vocabulary of the kernels: Eigen's packets of the widest instruction set that the unit is compiled for.
namespace headroom::inline v0::core::simd::inline HEADROOM_ISA {

template <class Scalar>
using Packet = typename Eigen::internal::packet_traits<Scalar>::type;

template <class Scalar>
using IntegerPacket = typename Eigen::internal::unpacket_traits<Packet<Scalar>>::integer_packet;

template <class Scalar>
inline constexpr int kLanes = Eigen::internal::unpacket_traits<Packet<Scalar>>::size;

template <class Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> load(const Scalar* p) {
  return Eigen::internal::ploadu<Packet<Scalar>>(p);
}
template <class Scalar>
EIGEN_ALWAYS_INLINE void store(Scalar* p, Packet<Scalar> x) {
  Eigen::internal::pstoreu(p, x);
}
template <class Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> broadcast(Scalar x) {
  return Eigen::internal::pset1<Packet<Scalar>>(x);
}

/// Whether pmadd rounds once.
#if defined(EIGEN_HAS_SINGLE_INSTRUCTION_MADD) || defined(EIGEN_VECTORIZE_FMA) || defined(EIGEN_VECTORIZE_AVX512)
inline constexpr bool kFusedMultiplyAdd = true;
#else
inline constexpr bool kFusedMultiplyAdd = false;
#endif

using Eigen::internal::padd;
using Eigen::internal::pand;
using Eigen::internal::pcmp_eq;
using Eigen::internal::pcmp_le;
using Eigen::internal::pcmp_lt;
using Eigen::internal::pmadd;  // a * b + c
using Eigen::internal::pmax;   // a NaN in the first operand wins
using Eigen::internal::pmul;
using Eigen::internal::pselect;
using Eigen::internal::psub;

/// Hides from the optimiser where `x` came from.
template <class P>
EIGEN_ALWAYS_INLINE void keep(P& x) {
#if EIGEN_ARCH_i386_OR_x86_64 && EIGEN_COMP_GNUC
  __asm__("" : "+v"(x));
#else
  EIGEN_OPTIMIZATION_BARRIER(x)
#endif
}

/// The larger of x and a bound; a NaN in x stays. Under -ffinite-math-only compilers swap the operands of a maximum,
/// and make one of a comparison and a selection.
template <class P>
EIGEN_ALWAYS_INLINE P at_least(const P& x, const P& bound) {
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
  P below = pcmp_lt(x, bound);
  keep(below);
  return pselect(below, bound, x);
#else
  return pmax(x, bound);
#endif
}

/// c[0]·f^n + c[1]·f^(n-1) + … + c[n]
template <class Scalar, class... Coefficients>
EIGEN_ALWAYS_INLINE Packet<Scalar> polynomial(Packet<Scalar> f, double first, Coefficients... rest) {
  Packet<Scalar> p = broadcast(static_cast<Scalar>(first));
  ((p = pmadd(p, f, broadcast(static_cast<Scalar>(rest)))), ...);
  return p;
}

/// 2^x for x <= 127; exactly 0 from x = -150 (double: -1080) down. Relative error below 9e-8, without FMA 1e-7 (double:
/// 3e-16), on average that of a correctly rounded result.
/// 2^x = 2^n · 2^f with n a whole number near x.
///
/// With a `rest` it is 2^(x - rest). The polynomial takes a rest up to 2^-11.
template <class Scalar, class... Rest>
EIGEN_ALWAYS_INLINE Packet<Scalar> exp2(Packet<Scalar> x, const Rest&... rest) {
  using namespace Eigen::internal;
  const auto constant = [](double c) __attribute__((always_inline)) { return broadcast(static_cast<Scalar>(c)); };
  if constexpr (std::is_same_v<Scalar, float> && kLanes < float >> 1) {
#ifdef EIGEN_VECTORIZE_AVX512DQ
    Packet<float> f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    ((f = psub(f, rest)), ...);
    const Packet<float> p =  // minimax with value 1 at 0
        polynomial<float>(f, 0.0002161291914225507, 0.001246784534126787, 0.009675451674098418, 0.05548528057207833,
                          0.2402293055609326, 0.6931470444428021, 1.0);
    return _mm512_scalef_ps(p, x);  // p·2^floor(x)
#else
    // Adding 1.5·2^23 leaves the nearest integer in the low bits of the mantissa, ready for the exponent.
    const Packet<float> magic = constant(12582912.0), lowest = constant(-127.0);
    x = at_least(x, lowest);
    Packet<float> shifted = padd(x, magic);
    keep(shifted);  // -ffast-math would cancel the two magics, here and below
    Packet<float> n = psub(shifted, magic);
    keep(n);
    Packet<float> f = psub(x, n);
    if constexpr (sizeof...(rest) > 0) keep(f);  // or the rest would be added to n
    // Below 2^-126.5 the exponent is all zeros only if p is not below 1: there the rest is left out
    ((f = psub(f, pand(rest, pcmp_lt(constant(-126.5), x)))), ...);
    const Packet<float> p =  // minimax with value 1 at 0
        polynomial<float>(f, 0.0001535336206275062, 0.001339887455719594, 0.00961843735823387, 0.05550332470783318,
                          0.240226479136156, 0.6931472028552114, 1.0);
    using Bits = IntegerPacket<float>;
    return preinterpret<Packet<float>>(
        padd(preinterpret<Bits>(p), plogical_shift_left<23>(preinterpret<Bits>(shifted))));
#endif
  } else {
    x = at_least(x, constant(-1080.0));
    const Packet<Scalar> n = print(x);  // round to the nearest integer
    Packet<Scalar> f = psub(x, n);
    if constexpr (sizeof...(rest) > 0) keep(f);
    ((f = psub(f, rest)), ...);
    const Packet<Scalar> p = polynomial<Scalar>(  // Taylor: ln(2)^k / k!, k = 13 … 0
        f, 1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10, 7.054911620801121e-09,
        1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
        0.0013333558146428441, 0.009618129107628477, 0.055504108664821576, 0.2402265069591007, 0.6931471805599453, 1.0);
    return pldexp(p, n);
  }
}

/// tanh(x): near 0 by a polynomial (Cephes), elsewhere as 1 - 2 / (e^(2|x|) + 1). Relative error below 2e-7 (double:
/// the standard library's).
template <class Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> tanh(Packet<Scalar> x) {
  using namespace Eigen::internal;
  if constexpr (std::is_same_v<Scalar, float> && kLanes < float >> 1) {
    const Packet<float> zero = broadcast(0.0F), one = broadcast(1.0F), square = pmul(x, x), size = pabs(x);
    const Packet<float> odd = polynomial<float>(square, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2,
                                                1.33314422036e-1, -3.33332819422e-1);
    const Packet<float> near = pmadd(pmul(odd, square), x, x);
    const Packet<float> limited = psub(zero, at_least(psub(zero, size), broadcast(-10.0F)));
    const Packet<float> power = exp2<float>(pmul(limited, broadcast(2.8853900817779268F)));
    const Packet<float> far = psub(one, pdiv(broadcast(2.0F), padd(power, one)));
    return pselect(pcmp_lt(size, broadcast(0.625F)), near, pselect(pcmp_lt(x, zero), psub(zero, far), far));
  } else {
    Scalar lanes[kLanes<Scalar>];
    store(lanes, x);
    for (Scalar& lane : lanes) lane = std::tanh(lane);
    return load(lanes);
  }
}

/// Transposes a square block of registers.
template <class Scalar>
EIGEN_ALWAYS_INLINE void transpose(Packet<Scalar> (&rows)[kLanes<Scalar>]) {
  Eigen::internal::PacketBlock<Packet<Scalar>, kLanes<Scalar>> block;
  for (int i = 0; i < kLanes<Scalar>; ++i) block.packet[i] = rows[i];
  Eigen::internal::ptranspose(block);
  for (int i = 0; i < kLanes<Scalar>; ++i) rows[i] = block.packet[i];
}

}  // namespace headroom::inline v0::core::simd::inline HEADROOM_ISA

#pragma GCC diagnostic pop
