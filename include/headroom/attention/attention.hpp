#pragma once

#include <algorithm>
#include <utility>

#include "headroom/attention/autograd.hpp"
#include "headroom/attention/checks.hpp"
#include "headroom/attention/chunked.hpp"
#include "headroom/attention/fused.hpp"
#include "headroom/attention/merge.hpp"
#include "headroom/attention/reference.hpp"
#include "headroom/attention/route.hpp"
#include "headroom/attention/tiled_backend.hpp"

namespace headroom::inline v0 {

namespace detail {

/// k or v with the batch dimensions of q, as a view.
inline torch::Tensor with_batch_of(const torch::Tensor& q, const torch::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  std::copy(q.sizes().begin(), q.sizes().end() - 3, sizes.begin());
  return x.expand(sizes);
}

/// The log-sum-exp is in double; it may be undefined unless wanted.
HEADROOM_KERNEL AttentionForward run_backend(const torch::Tensor& given_q, const torch::Tensor& given_k,
                                             const torch::Tensor& given_v, const AttentionOptions& options,
                                             bool with_lse);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL AttentionForward run_backend(const torch::Tensor& given_q, const torch::Tensor& given_k,
                                             const torch::Tensor& given_v, const AttentionOptions& options,
                                             bool with_lse) {
  const auto request = AttentionRequest::check(given_q, given_k, given_v, options);
  // The imaginary part of a conjugate has its minus sign beside its memory
  const torch::Tensor q = given_q.resolve_neg(), k = given_k.resolve_neg(), v = given_v.resolve_neg();
  switch (resolve_backend(q, request, options.backend())) {
    case AttentionBackend::tiled:
      // The kernel steps through one batch dimension: with more, keys that batches share are expanded, not copied.
      return q.dim() <= 4
                 ? AttentionFunction<TiledBackend>::run({q, k, v, request})
                 : AttentionFunction<TiledBackend>::run({q, with_batch_of(q, k), with_batch_of(q, v), request});
    case AttentionBackend::fused:
      return AttentionFunction<FusedBackend>::run({q, with_batch_of(q, k), with_batch_of(q, v), request});
    case AttentionBackend::chunked:
      return AttentionFunction<ChunkedBackend>::run({q, k, v, request});
    default:
      return reference_attention({q, k, v, request}, with_lse, compute_type(q));
  }
}
#endif

/// The log-sum-exp is undefined unless wanted.
inline AttentionResult run_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                     const AttentionOptions& options, bool with_lse) {
  const AttentionForward result = run_backend(q, k, v, options, with_lse);
  return {result.output.to(q.scalar_type()), with_lse ? result.lse.to(compute_type(q)) : torch::Tensor()};
}

}  // namespace detail

/// softmax(softcap(scale·q·kᵀ) + what is added to scores, over the allowed keys)·v, as AttentionOptions define it;
/// differentiable in q, k, v, bias, relative_bias, alibi_slopes, sink, polar_phase and the tables of a score function.
/// q [..., H, Lq, D], k [..., Hk, Lk, D], v [..., Hk, Lk, Dv]: three dimensions or more, any strides, floating-point
/// dtype (computed in float, in double for double). Head h of q attends to head h·Hk/H of k and v; their batch
/// dimensions broadcast to those of q. The output lies in memory in the order of q's dimensions. A query without keys
/// gets output 0 and gradient 0. Saved for backward: q, k, v, output and the log-sum-exp. Throws
/// headroom.attention.*, and .double_backward for second derivatives unless the backend is reference.
inline torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/false).output;
}

/// The same with a score function in the options: a callable f(score, place, tables...), or ScoreFunction(f,
/// tables...).
inline torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               AttentionOptions options, ScoreFunction score_function) {
  return attention(q, k, v, options.score_function(std::move(score_function)));
}

/// The same with the log-sum-exp of the scores, the sink's included: float (double for double inputs), -inf for a
/// query without keys.
inline AttentionResult attention_with_lse(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                          const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/true);
}

}  // namespace headroom::inline v0
