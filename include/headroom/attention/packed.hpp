#pragma once

#include "headroom/attention/attention.hpp"

namespace headroom::inline v0::detail {

/// Views of packed projections [..., 3, H, D] as q, k, v [..., H, L, D] with the sequence dimension `axis` moved behind
/// the heads. No copy.
inline std::array<torch::Tensor, 3> unpack_views(const torch::Tensor& packed, int64_t axis) {
  const auto part = [&](int64_t i) { return packed.select(-3, i).movedim(axis, -2); };
  return {part(0), part(1), part(2)};
}

/// Rotates q and k of packed projections in place: complex pairs of features times `rotation` (complex, broadcastable
/// to
/// [..., 2, H, D/2]).
inline void rotate_packed(const torch::Tensor& packed, const torch::Tensor& rotation) {
  const torch::Tensor qk = packed.narrow(-3, 0, 2);
  torch::view_as_complex(qk.unflatten(-1, {-1, 2})).mul_(rotation);
}

inline torch::Tensor packed_attention_backward(const torch::Tensor& grad_output, const torch::Tensor& packed,
                                               const torch::Tensor& output, const torch::Tensor& lse,
                                               const std::optional<torch::Tensor>& rotation, int64_t axis,
                                               const AttentionRequest& request) {
  const torch::Tensor grad = torch::empty_like(packed);
  const auto [q, k, v] = unpack_views(packed, axis);
  const auto [grad_q, grad_k, grad_v] = unpack_views(grad, axis);
  tiled_attention_backward(grad_output.resolve_neg().movedim(axis, -2), {}, q, k, v, {output, lse}, request,
                           {grad_q, grad_k, grad_v}, TiledParamGradients(q, request, {}));
  if (rotation.has_value()) rotate_packed(grad, rotation->conj());
  return grad;
}

/// Self-attention over one projection that holds q, k and v: nothing is copied on the way in, and the gradient is
/// written where the projection's backward wants it. `packed` is rotated in place, so it must not be used elsewhere.
struct PackedAttention : torch::autograd::Function<PackedAttention> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& packed,
                               const std::optional<torch::Tensor>& rotation, int64_t axis,
                               const AttentionRequest& request) {
    if (rotation.has_value()) rotate_packed(packed, *rotation);
    const auto [q, k, v] = unpack_views(packed, axis);
    const AttentionForward result = tiled_attention(q, k, v, request);
    ctx->save_for_backward({packed, result.output, result.lse, rotation.value_or(torch::Tensor())});
    ctx->saved_data["axis"] = axis;
    save_request(ctx, request);
    return result.output.movedim(-2, axis);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    const auto saved = ctx->get_saved_variables();
    const auto rotation = saved[3].defined() ? std::optional(saved[3]) : std::nullopt;
    auto grads = first_derivatives({grad[0], saved[0]}, [&]() -> torch::autograd::variable_list {
      return {packed_attention_backward(grad[0], saved[0], saved[1], saved[2], rotation,
                                        ctx->saved_data["axis"].toInt(), saved_request(ctx, {}))};
    });
    grads.resize(4);  // only packed has a gradient
    return grads;
  }
};

/// packed [..., 3, H, D] -> [..., H, D]: attention along dimension `axis` (counted from the front) of the leading ones.
inline torch::Tensor packed_attention(const torch::Tensor& packed, const std::optional<torch::Tensor>& rotation,
                                      int64_t axis, const AttentionOptions& options) {
  {
    const auto [q, k, v] = unpack_views(packed, axis);
    const auto request = AttentionRequest::check(q, k, v, options);
    if (resolve_backend(q, request, options.backend()) == AttentionBackend::tiled) {
      return PackedAttention::apply(packed, rotation, axis, request);
    }
  }
  torch::Tensor rotated = packed;
  if (rotation.has_value()) {
    rotated = packed.clone();
    rotate_packed(rotated, *rotation);
  }
  const auto [q, k, v] = unpack_views(rotated, axis);
  return run_attention(q, k, v, options, /*with_lse=*/false).output.movedim(-2, axis);
}

}  // namespace headroom::inline v0::detail
