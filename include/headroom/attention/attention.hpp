#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "headroom/attention/reference.hpp"
#include "headroom/attention/tiled.hpp"

namespace headroom::inline v0 {

/// Output of attention and, for each query, the natural logarithm of the sum of exponentials of its scores.
struct AttentionResult {
  torch::Tensor output;  ///< [..., H, Lq, Dv]
  torch::Tensor lse;     ///< [..., H, Lq], float (double for double inputs), not differentiable; -inf without keys
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

}  // namespace detail

/// softmax(scale·q·kᵀ over the allowed keys)·v and its log-sum-exp, differentiable in q, k and v through the output.
/// q [..., H, Lq, D], k [..., H, Lk, D], v [..., H, Lk, Dv]: three dimensions or more, any strides, floating-point
/// dtype (computed in float, in double for double). The output lies in memory in the order of q's dimensions. A query
/// without keys gets output 0, lse -inf, gradient 0. Saved for backward: q, k, v, output and lse. Throws
/// headroom.attention.{shape,dtype,scale,key_lengths,backend}, and .double_backward for second derivatives.
inline AttentionResult attention_with_lse(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                          const AttentionOptions& options = {}) {
  const auto request = detail::AttentionRequest::check(q, k, v, options);
  const auto lse_type = q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  if (detail::resolve_backend(q, options.backend()) == AttentionBackend::reference) {
    const auto result = detail::reference_attention(q, k, v, request);
    return {result.output, result.lse.to(lse_type)};
  }
  const auto result =
      detail::TiledAttention::apply(detail::widened(q), detail::widened(k), detail::widened(v), request);
  return {result[0].to(q.scalar_type()), result[1].to(lse_type)};
}

/// The output of attention_with_lse.
inline torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const AttentionOptions& options = {}) {
  return attention_with_lse(q, k, v, options).output;
}

}  // namespace headroom::inline v0
