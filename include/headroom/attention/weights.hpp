#pragma once

#include "headroom/attention/attention.hpp"

namespace headroom::inline v0 {

namespace detail {

/// Weights as the output of a backend, [..., H, Lq, Lk] or their mean over the heads [..., 1, Lq, Lk].
template <bool kMeanOverHeads>
struct WeightsBackend {
  static constexpr bool kDifferentiableLse = false;

  static AttentionForward forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                  const AttentionRequest& request) {
    const ChunkedAttention chunks(q, k, v, request);
    const torch::Tensor lse = chunks.forward().lse;
    return {chunks.weights(lse, kMeanOverHeads), lse};
  }
  static AttentionGradients backward(const torch::Tensor& grad_output, const torch::Tensor&, const torch::Tensor& q,
                                     const torch::Tensor& k, const torch::Tensor& v, const AttentionForward& forward,
                                     const AttentionRequest& request, const std::array<bool, 7>& wanted) {
    return ChunkedAttention(q, k, v, request).weights_backward(grad_output, forward.lse, wanted);
  }
};

}  // namespace detail

/// The weights that attention(q, k, v, options) gives to the keys, before dropout: [..., H, Lq, Lk], or their mean over
/// the heads [..., Lq, Lk], which is summed up chunk by chunk. Differentiable like attention; the backward pass
/// recomputes the weights from q, k and the log-sum-exp. By ATen operators on any device, whatever the backend in the
/// options. A query without keys has weights 0; the sink's share is left out. Throws headroom.attention.*.
HEADROOM_KERNEL torch::Tensor attention_weights(const torch::Tensor& q, const torch::Tensor& k,
                                                AttentionOptions options = {}, bool mean_over_heads = false);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor attention_weights(const torch::Tensor& q, const torch::Tensor& k,
                                                AttentionOptions options, bool mean_over_heads) {
  const torch::Tensor no_values = k.defined() && k.dim() > 0 ? k.detach().narrow(-1, 0, 0) : k;
  const auto request = detail::AttentionRequest::check(q, k, no_values, options.dropout(0));
  using detail::AttentionFunction, detail::WeightsBackend;
  const torch::Tensor weights =
      mean_over_heads ? AttentionFunction<WeightsBackend<true>>::run(q, k, no_values, request).output.squeeze(-3)
                      : AttentionFunction<WeightsBackend<false>>::run(q, k, no_values, request).output;
  return weights.to(q.scalar_type());
}
#endif

}  // namespace headroom::inline v0
