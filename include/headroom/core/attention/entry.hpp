#pragma once

#include "headroom/core/attention/checks.hpp"
#include "headroom/core/attention/kernels.hpp"
#include "headroom/core/executor.hpp"

// What calls the kernels of its own unit and what calls those of the program are different functions; so are those of
// units with different flags.
#ifdef HEADROOM_SEPARATE_KERNELS
#define HEADROOM_JOINED_TEXT(a, b) a##b
#define HEADROOM_JOINED(a, b) HEADROOM_JOINED_TEXT(a, b)
#define HEADROOM_CALLS HEADROOM_JOINED(program_, HEADROOM_ISA)
#else
#define HEADROOM_CALLS HEADROOM_ISA
#endif

namespace headroom::inline v0::core {
namespace detail::inline HEADROOM_CALLS {

/// The pass of a problem whose tensors are stored as T.
template <Storable T, class Problem>
std::unique_ptr<Pass> pass_of(const Problem& x, const AttentionParams& params, const MaskRef& mask, Index workers) {
#ifdef HEADROOM_SEPARATE_KERNELS
  const AttentionKernels& kernels = attention_kernels();
  check_lanes(params, kernels.lanes, kernels.instruction_set);
  return kernels.of(x)(x, params, mask, workers);
#else
  check_lanes(params, simd::kLanes<float>, HEADROOM_ISA_NAME);
  return make_pass<ComputeType<T>>(x, params, mask, workers);
#endif
}

template <Storable T, class Problem, Mask M, Executor E>
void run_pass(const Problem& x, const AttentionParams& params, const M& mask, const E& executor) {
  const std::unique_ptr<Pass> pass = pass_of<T>(x, params, MaskRef(mask), executor.workers());
  if (pass->tasks() == 0) return;
  const auto workspace = executor.allocate(pass->workspace_bytes());
  pass->use(workspace.data());
  if (pass->preparations() > 0) {
    executor.run(pass->preparations(), [&](Index task, int) { pass->prepare(task); });
  }
  executor.run(pass->tasks(), [&](Index task, int worker) { pass->run(task, worker); });
}

}  // namespace detail::inline HEADROOM_CALLS
inline namespace HEADROOM_CALLS {

/// The instruction set of the kernels that attention uses here: sse2, avx2, avx512, avx512bf16, amx, neon, ….
inline const char* instruction_set() {
#ifdef HEADROOM_SEPARATE_KERNELS
  return detail::attention_kernels().instruction_set;
#else
  return HEADROOM_ISA_NAME;
#endif
}

/// output = softmax(scores over the keys that the mask allows)·v without ever storing the scores; AttentionParams says
/// what a score is. float, double, or bfloat16 and half (summed in float). lse is the natural logarithm of the sum of
/// exponentials (double because rounding it to float would cost up to 22 times the naive error in the backward pass). A
/// query that sees no key gets output 0 and lse -inf, or the sink, which is all that is left in its softmax. Nothing of
/// a key reaches a query that does not see it. Workspace: less than 1 MiB a worker. Results are bit-equal for any
/// number of workers. Throws headroom.core.attention.{shape,scale,dropout,length,output,lanes}.
template <Storable T, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_forward(const AttentionTensors<T>& tensors, const AttentionParams& params = {}, const M& mask = {},
                       const E& executor = {}) {
  const detail::ForwardProblem x{tensors.q,      tensors.k,   tensors.v,
                                 tensors.output, tensors.lse, params.features(tensors.q.dim())};
  detail::check_problem(x, params);
  detail::check_writable("the output", x.output);
  detail::run_pass<T>(x, params, mask, executor);
}

/// Gradients of attention_forward with respect to q, k and v, and to what AttentionParams adds to scores where wanted,
/// given the gradient of its output and, unless it is a null view, of its lse. `output` and `lse` are what the forward
/// pass wrote; weights are recomputed tile by tile. grad_q, grad_k and grad_v must not overlap with each other or with
/// what is read. Queries without keys and keys without queries get gradient 0.
/// Workspace: less than 1 MiB and delta [Lq] a worker; where grad_q is stored in 16 bits also [Lq][D] of those; for
/// gradients of relative bias, slopes, phases and of a bias that is broadcast along the keys also their length, of a
/// bias that is stored in 16 bits and broadcast otherwise [Lq][192]. Results are bit-equal for any number of workers.
/// Throws headroom.core.attention.{shape,scale,dropout,length,output,lanes}.
template <Storable T, Mask M = NoMask, Executor E = DefaultExecutor>
void attention_backward(const AttentionBackwardTensors<T>& tensors, const AttentionParams& params = {},
                        const M& mask = {}, const E& executor = {}) {
  const TensorView<const double>& lse = tensors.lse;
  const detail::BackwardProblem x{{tensors.q,
                                   tensors.k,
                                   tensors.v,
                                   tensors.output,
                                   {const_cast<double*>(lse.data), lse.shape, lse.strides},
                                   params.features(tensors.q.dim())},
                                  tensors.grad_output,
                                  tensors.grad_lse,
                                  tensors.grad_q,
                                  tensors.grad_k,
                                  tensors.grad_v,
                                  tensors.param_grads};
  detail::check_problem(x, params);
  detail::check_gradients(x, params);
  detail::check_writable("grad_q", x.grad_q);
  detail::check_writable("grad_k", x.grad_k);
  detail::check_writable("grad_v", x.grad_v);
  detail::run_pass<T>(x, params, mask, executor);
}

}  // namespace HEADROOM_CALLS
}  // namespace headroom::inline v0::core

#undef HEADROOM_CALLS
#undef HEADROOM_JOINED
#undef HEADROOM_JOINED_TEXT
