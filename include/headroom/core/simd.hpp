#pragma once

#include <Eigen/Core>
#include <cmath>
#include <type_traits>

#include "headroom/core/view.hpp"

// GCC warns that a vector type as template argument loses its alignment attribute: never used that way here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

/// The SIMD vocabulary of the kernels: Eigen's packets of the widest instruction set that the unit is compiled for.
namespace headroom::inline v0::core::simd {

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

using Eigen::internal::padd;
using Eigen::internal::pmadd;  // a * b + c
using Eigen::internal::pmax;   // a NaN in the first operand wins
using Eigen::internal::pmul;
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

/// 2^x for x <= 127; exactly 0 from x = -127 (double: -1080) down. Relative error below 1e-7 (double: 3e-16).
/// 2^x = 2^n · 2^f with n the nearest integer and |f| <= 1/2.
template <class Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> exp2(Packet<Scalar> x) {
  using namespace Eigen::internal;
  const auto constant = [](double c) __attribute__((always_inline)) { return broadcast(static_cast<Scalar>(c)); };
  if constexpr (std::is_same_v<Scalar, float> && kLanes < float >> 1) {
    // Adding 1.5·2^23 leaves the nearest integer in the low bits of the mantissa, ready for the exponent.
    const Packet<float> magic = constant(12582912.0);
    x = pmax(x, constant(-127.0));
    Packet<float> shifted = padd(x, magic);
    keep(shifted);  // -ffast-math would cancel the two magics, here and below
    Packet<float> n = psub(shifted, magic);
    keep(n);
    const Packet<float> f = psub(x, n);
    Packet<float> p = constant(0.001326472731307149);  // minimax of degree 5 with value 1 at 0
    p = pmadd(p, f, constant(0.009671512991189957));
    p = pmadd(p, f, constant(0.05550733581185341));
    p = pmadd(p, f, constant(0.24022242426872253));
    p = pmadd(p, f, constant(0.6931470036506653));
    p = pmadd(p, f, constant(1.0));
    using Bits = IntegerPacket<float>;
    return preinterpret<Packet<float>>(
        padd(preinterpret<Bits>(p), plogical_shift_left<23>(preinterpret<Bits>(shifted))));
  } else {
    x = pmax(x, constant(-1080.0));
    const Packet<Scalar> n = print(x);  // round to the nearest integer
    const Packet<Scalar> f = psub(x, n);
    Packet<Scalar> p = constant(1.3691488853904124e-12);  // Taylor: ln(2)^k / k!, k = 13 … 0
    for (const double c :
         {2.5678435993488196e-11, 4.44553827187081e-10, 7.054911620801121e-09, 1.0178086009239696e-07,
          1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
          0.009618129107628477, 0.055504108664821576, 0.2402265069591007, 0.6931471805599453, 1.0}) {
      p = pmadd(p, f, constant(c));
    }
    return pldexp(p, n);
  }
}

/// tanh(x), accurate for small x too.
template <class Scalar>
EIGEN_ALWAYS_INLINE Packet<Scalar> tanh(Packet<Scalar> x) {
  if constexpr (Eigen::internal::packet_traits<Scalar>::HasTanh) {
    return Eigen::internal::ptanh(x);
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

}  // namespace headroom::inline v0::core::simd

#pragma GCC diagnostic pop
