#pragma once

#include <memory>
#include <type_traits>

#include "headroom/core/attention/backward_pass.hpp"
#include "headroom/core/attention/forward.hpp"
#include "headroom/core/attention/mask_ref.hpp"
#include "headroom/core/attention/pass.hpp"
#include "headroom/core/separate_kernels.hpp"

/// Where those who call kernels meet those who compile them: what is passed here knows of no vectors, so that both may
/// have different flags.
namespace headroom::inline v0::core::detail {

/// The kernels that were compiled for one instruction set. Passes refer to what they are made of.
struct AttentionKernels {
  const char* instruction_set;
  int lanes;  // floats in a vector
  std::unique_ptr<Pass> (*forward)(const ForwardProblem& x, const AttentionParams& params, const MaskRef& mask,
                                   Index workers);
  std::unique_ptr<Pass> (*backward)(const BackwardProblem& x, const AttentionParams& params, const MaskRef& mask,
                                    Index workers);

  auto of(const ForwardProblem&) const { return forward; }
  auto of(const BackwardProblem&) const { return backward; }
};

inline namespace HEADROOM_ISA {

/// A pass by the kernels of this unit, computed in Scalar.
template <class Scalar, class Problem>
std::unique_ptr<Pass> make_pass(const Problem& x, const AttentionParams& params, const MaskRef& mask, Index workers) {
  constexpr bool kBackward = std::is_same_v<Problem, BackwardProblem>;
  using PassOf = std::conditional_t<kBackward, BackwardPass<Scalar>, ForwardPass<Scalar>>;
  return std::make_unique<PassOf>(x, params, mask, workers);
}
/// The same, computed in what the problem's tensors ask for.
template <class Problem>
std::unique_ptr<Pass> make_any_pass(const Problem& x, const AttentionParams& params, const MaskRef& mask,
                                    Index workers) {
  const bool in_double = x.q.type == StoredType::float64;
  return (in_double ? make_pass<double, Problem> : make_pass<float, Problem>)(x, params, mask, workers);
}

/// All kernels of this unit; a template, so that they are compiled where somebody asks for them.
template <class Kernels = AttentionKernels>
const Kernels& kernels_of_this_unit() {
  static constexpr Kernels kKernels{HEADROOM_ISA_NAME, simd::kLanes<float>, make_any_pass<ForwardProblem>,
                                    make_any_pass<BackwardProblem>};
  return kKernels;
}

}  // namespace HEADROOM_ISA

#ifdef HEADROOM_SEPARATE_KERNELS
/// The kernels of this program: those of its one unit that compiles them, or of headroom::kernels, which takes the
/// widest instruction set that the processor has. Throws headroom.core.instruction_set.
const AttentionKernels& attention_kernels();

#if defined(HEADROOM_KERNELS_HERE) && !defined(HEADROOM_KERNELS_AT_RUN_TIME)
const AttentionKernels& attention_kernels() { return kernels_of_this_unit(); }
#endif
#endif

}  // namespace headroom::inline v0::core::detail
