#pragma once

#include "headroom/core/attention/bfloat16_rows.hpp"
#include "headroom/core/attention/online_softmax.hpp"
#include "headroom/core/attention/read_ahead.hpp"
#include "headroom/core/attention/schedule.hpp"
#include "headroom/core/scratch.hpp"

/// The seven products of attention, with S = scores, P = weights, O = output, G = gradient of the output:
///   forward   S = K·Qᵀ    O += Vᵀ·P
///   backward  S = Q·Kᵀ    dP = G·Vᵀ    dV += Gᵀ·P    dK += Qᵀ·dS    dQ += dS·K
///
/// Two policies compute them behind one interface: in float or double (float_forward.hpp, float_backward.hpp), and in
/// bfloat16 with sums in float (bfloat16_forward.hpp, bfloat16_backward.hpp). A policy brings operands into the form
/// in which it multiplies (`load_…`), multiplies, and keeps what is not finite away from who must not see it: 0·NaN is
/// NaN, so it is taken out of a product and added for those that do see it.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// One head of a problem.
template <class Scalar>
struct Head {
  const ForwardProblem& x;
  const ScoreFunction<Scalar>& score;
  HeadIndex index;
  ReadAhead& ahead;  // of the head after it

  StoredMatrix of(const StoredTensor& tensor) const { return tensor.head(index.b, index.h, x.heads()); }
  /// What positions make of rows of q and of k.
  RowPositions<Scalar> query_positions() const {
    const AttentionParams& params = score.params();
    return {Rotation(Angles::of_queries(params, params.rotary)),
            PolarForm(Angles::of_queries(params, params.polar), of(x.q))};
  }
  RowPositions<Scalar> key_positions() const {
    const AttentionParams& params = score.params();
    const StoredMatrix phase = params.polar_phase.head(0, index.h, x.heads());
    return {Rotation(Angles::of_keys(params, params.rotary)),
            PolarForm(Angles::of_keys(params, params.polar), of(x.k), static_cast<const Scalar*>(phase.data))};
  }

 private:
  using Angles = AngleTable<Scalar>;
};

/// Whether memory has to serve bfloat16 products too.
template <class Scalar>
inline constexpr bool kMayUseBfloat16 = kHasBfloat16Products&& std::is_same_v<Scalar, float>;

/// Whether a problem is multiplied in bfloat16. For a few keys that would take longer than to widen them, and for some
/// more where features fill no more than half of a step.
inline bool uses_bfloat16(const ForwardProblem& x, const AttentionParams& params) {
  return kHasBfloat16Products && AmxTiles::available() && !params.rotary && x.q.type == kStoredType<Eigen::bfloat16> &&
         x.k.length() >=
             (x.features <= kVnniDepth / 2 ? std::max<Index>(48, kFewestBfloat16Keys) : kFewestBfloat16Keys);
}

/// Features in memory: bfloat16 products take them in multiples.
template <class Scalar>
constexpr Index padded_dim(Index dim) {
  return kMayUseBfloat16<Scalar> ? padded(dim, kVnniDepth) : dim;
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
