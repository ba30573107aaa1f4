#pragma once

#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "headroom/attention/attention.hpp"

namespace headroom::inline v0::detail {

/// Views of packed projections [..., H+2Hk, D] as q [..., H, L, D], k and v [..., Hk, L, D], with the sequence
/// dimension `axis` moved behind the heads. No copy.
inline std::array<torch::Tensor, 3> unpack_views(const torch::Tensor& packed, int64_t heads, int64_t axis) {
  const int64_t kv_heads = (packed.size(-2) - heads) / 2;
  const auto part = [&](int64_t first, int64_t count) { return packed.narrow(-2, first, count).movedim(axis, -2); };
  return {part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)};
}

/// Rotates q and k of packed projections in place: complex pairs of features times `rotation`, complex, broadcastable
/// to [..., H+Hk, D/2]. Narrow types are rotated in float.
inline void rotate_packed(const torch::Tensor& packed, int64_t heads, const torch::Tensor& rotation) {
  const torch::Tensor qk = packed.narrow(-2, 0, (packed.size(-2) + heads) / 2), wide = qk.to(compute_type(qk));
  torch::view_as_complex(wide.unflatten(-1, {-1, 2})).mul_(rotation);
  if (!wide.is_same(qk)) qk.copy_(wide);
}

/// Self-attention over one projection that holds q, k and v, by a backend as AttentionFunction takes it: nothing is
/// copied on the way in, and backward gives one gradient, packed as well. `packed` is rotated in place, so with a
/// rotation it must not be used elsewhere.
template <class Backend>
struct PackedAttention : torch::autograd::Function<PackedAttention<Backend>> {
  using Optional = std::optional<torch::Tensor>;

  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& packed, const Optional&,
                               const Optional&, const Optional&, const Optional&, const Optional& rotation,
                               int64_t axis, AttentionRequest request) {
    if (rotation.has_value()) rotate_packed(packed, request.heads(), *rotation);
    const auto [q, k, v] = unpack_views(packed, request.heads(), axis);
    const AttentionForward result =
        attention_result([&, q = q, k = k, v = v] { return Backend::forward(q, k, v, request); });
    torch::autograd::variable_list saved{packed, result.output, result.lse, rotation.value_or(torch::Tensor())};
    for (const torch::Tensor* x : request.tensors()) saved.push_back(*x);
    saved.insert(saved.end(), result.extra.begin(), result.extra.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["axis"] = axis;
    save_request(ctx, request);
    return result.output;  // a view could not be changed in place
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad_output) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &packed = saved[0], &rotation = saved[3];
    const AttentionForward forward{saved[1], saved[2], at::TensorList(saved).slice(11).vec()};
    const int64_t axis = ctx->saved_data["axis"].toInt();
    const AttentionRequest request = saved_request(ctx, at::TensorList(saved).slice(4, 7));
    std::array<bool, 7> wanted{true, true, true};  // of q, k and v there is only the whole
    torch::autograd::variable_list inputs{grad_output[0], packed};
    for (size_t i = 3, edge = 1; i < wanted.size(); ++i) {
      inputs.push_back(saved[i + 1]);
      wanted[i] = saved[i + 1].defined() && ctx->needs_input_grad(edge++);
    }
    auto grads = first_derivatives(inputs, [&]() -> torch::autograd::variable_list {
      const auto [grad_packed, grad] = gradients(grad_output[0].resolve_neg(), packed, axis, forward, request, wanted);
      if (rotation.defined()) rotate_packed(grad_packed, request.heads(), rotation.conj());
      return {grad_packed, grad.bias, grad.relative_bias, grad.alibi_slopes, grad.sink};
    });
    grads.resize(8);  // rotation, axis and request have no gradient
    return grads;
  }

  static torch::Tensor run(const torch::Tensor& packed, const Optional& rotation, int64_t axis,
                           const AttentionRequest& request) {
    const auto given = [](const torch::Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; };
    return PackedAttention::apply(packed, given(request.bias), given(request.relative_bias),
                                  given(request.alibi_slopes), given(request.sink), rotation, axis,
                                  AttentionRequest(request))
        .movedim(-2, axis);
  }

 private:
  /// The gradient of `packed`, and those of what is added to scores.
  static std::pair<torch::Tensor, AttentionGradients> gradients(const torch::Tensor& grad_output,
                                                                const torch::Tensor& packed, int64_t axis,
                                                                const AttentionForward& forward,
                                                                const AttentionRequest& request,
                                                                const std::array<bool, 7>& wanted) {
    const auto [q, k, v] = unpack_views(packed, request.heads(), axis);
    if constexpr (std::is_same_v<Backend, TiledBackend>) {  // writes with any strides
      const torch::Tensor grad_packed = torch::empty_like(packed);
      const auto [grad_q, grad_k, grad_v] = unpack_views(grad_packed, request.heads(), axis);
      const TiledParamGradients sums(q, request, wanted);
      AttentionGradients grad{grad_q, grad_k, grad_v};
      tiled_attention_backward({q, k, v, forward, grad_output, torch::Tensor()}, request, grad, sums);
      sums.store(grad, request);
      return {grad_packed, grad};
    } else {
      AttentionGradients grad = Backend::backward(grad_output, {}, q, k, v, forward, request, wanted);
      const torch::Tensor grad_packed = torch::empty_like(packed);
      const auto targets = unpack_views(grad_packed, request.heads(), axis);
      targets[0].copy_(std::exchange(grad.q, {}));
      targets[1].copy_(std::exchange(grad.k, {}));
      targets[2].copy_(std::exchange(grad.v, {}));
      return {grad_packed, grad};
    }
  }
};

/// packed [..., H+2Hk, D] -> [..., H, D]: attention of so many heads H along dimension `axis` (counted from the front)
/// of the leading ones. Saved for backward: packed, rotated in place, the output and the log-sum-exp; the backend
/// reference saves scores.
HEADROOM_KERNEL torch::Tensor packed_attention(const torch::Tensor& packed, int64_t heads,
                                               const std::optional<torch::Tensor>& rotation, int64_t axis,
                                               const AttentionOptions& options);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor packed_attention(const torch::Tensor& packed, int64_t heads,
                                               const std::optional<torch::Tensor>& rotation, int64_t axis,
                                               const AttentionOptions& options) {
  {
    const auto [q, k, v] = unpack_views(packed, heads, axis);
    const auto request = AttentionRequest::check(q, k, v, options);
    switch (resolve_backend(q, request, options.backend())) {
      case AttentionBackend::tiled:
        return PackedAttention<TiledBackend>::run(packed, rotation, axis, request);
      case AttentionBackend::fused:
        return PackedAttention<FusedBackend>::run(packed, rotation, axis, request);
      case AttentionBackend::chunked:
        return PackedAttention<ChunkedBackend>::run(packed, rotation, axis, request);
      default:
        break;
    }
  }
  torch::Tensor rotated = packed;
  if (rotation.has_value()) {
    rotated = packed.clone();
    rotate_packed(rotated, heads, *rotation);
  }
  const auto [q, k, v] = unpack_views(rotated, heads, axis);
  return run_attention(q, k, v, options, /*with_lse=*/false).output.movedim(-2, axis);
}
#endif

}  // namespace headroom::inline v0::detail
