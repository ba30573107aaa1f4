#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "headroom/attention/reference.hpp"
#include "headroom/attention/tiled.hpp"

namespace headroom::inline v0 {

/// Output of attention and, for each query, the natural logarithm of the sum of exponentials of its scores.
struct AttentionResult {
  torch::Tensor output;  ///< [..., H, Lq, Dv]
  torch::Tensor lse;     ///< [..., H, Lq]
};

namespace detail {

/// The backend that `automatic` stands for; fails when the named one can't honour the request.
inline AttentionBackend resolve_backend(const torch::Tensor& q, AttentionBackend wanted) {
  if (wanted == AttentionBackend::reference) return wanted;
  require(q.device().is_cpu(), "headroom.attention.backend", "backend ", wanted, " computes on the CPU, q is on ",
          q.device(), "; move the tensors to the CPU or ask for the backend reference, which stores L x L scores");
  return AttentionBackend::tiled;
}

/// The tiled kernel reads float and double; narrower dtypes are computed in float.
inline torch::Tensor widened(const torch::Tensor& x) {
  return x.scalar_type() == torch::kDouble ? x : x.to(torch::kFloat);
}

/// Saved request for a backward pass.
inline void save_request(torch::autograd::AutogradContext* ctx, const AttentionRequest& request) {
  ctx->saved_data["causal"] = request.causal;
  ctx->saved_data["scale"] = request.scale;
  ctx->saved_data["key_lengths"] = request.key_lengths;
}
inline AttentionRequest saved_request(torch::autograd::AutogradContext* ctx) {
  return {ctx->saved_data["causal"].toBool(), ctx->saved_data["scale"].toDouble(),
          ctx->saved_data["key_lengths"].toTensor()};
}

[[noreturn]] inline void refuse_double_backward() {
  fail("headroom.attention.double_backward",
       "second derivatives of tiled attention are not implemented; call backward without create_graph, or use the "
       "backend "
       "reference");
}

/// The gradients as a function of their own, so that differentiating them fails instead of being silently wrong.
struct TiledAttentionBackward : torch::autograd::Function<TiledAttentionBackward> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const torch::Tensor& grad_output,
                                                const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                                const torch::Tensor& output, const torch::Tensor& lse,
                                                const AttentionRequest& request) {
    const AttentionGradients grad{empty_in_order_of(q, q.sizes(), q.options()),
                                  empty_in_order_of(k, k.sizes(), k.options()),
                                  empty_in_order_of(v, v.sizes(), v.options())};
    tiled_attention_backward(grad_output, q, k, v, {output, lse}, request, grad);
    return {grad.q, grad.k, grad.v};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    refuse_double_backward();
  }
};

struct TiledAttention : torch::autograd::Function<TiledAttention> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& q,
                                                const torch::Tensor& k, const torch::Tensor& v,
                                                const AttentionRequest& request) {
    const AttentionForward result = tiled_attention(q, k, v, request);
    ctx->save_for_backward({q, k, v, result.output, result.lse});
    save_request(ctx, request);
    ctx->mark_non_differentiable({result.lse});
    return {result.output, result.lse};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    const auto saved = ctx->get_saved_variables();
    auto grads =
        TiledAttentionBackward::apply(grad[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved_request(ctx));
    grads.emplace_back();  // the request has no gradient
    return grads;
  }
};

/// The log-sum-exp is undefined unless wanted.
inline AttentionResult run_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                     const AttentionOptions& options, bool with_lse) {
  const auto request = AttentionRequest::check(q, k, v, options);
  AttentionResult result;
  if (resolve_backend(q, options.backend()) == AttentionBackend::reference) {
    auto [output, lse] = reference_attention(q, k, v, request, with_lse);
    result = {output, lse};
  } else {
    const auto tensors = TiledAttention::apply(widened(q), widened(k), widened(v), request);
    result = {tensors[0].to(q.scalar_type()), tensors[1]};
  }
  if (with_lse) result.lse = result.lse.to(q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat);
  return result;
}

}  // namespace detail

/// softmax(scale·q·kᵀ over the allowed keys)·v, differentiable in q, k and v.
/// q [..., H, Lq, D], k [..., H, Lk, D], v [..., H, Lk, Dv]: three dimensions or more, any strides, floating-point
/// dtype (computed in float, in double for double). The output lies in memory in the order of q's dimensions. A query
/// without keys gets output 0 and gradient 0. Saved for backward: q, k, v, output and the log-sum-exp. Throws
/// headroom.attention.{shape,dtype,scale,key_lengths,backend}, and .double_backward for second derivatives.
inline torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/false).output;
}

/// The same with the log-sum-exp of the scores: float (double for double inputs), -inf for a query without keys, not
/// differentiable.
inline AttentionResult attention_with_lse(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                          const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/true);
}

}  // namespace headroom::inline v0
