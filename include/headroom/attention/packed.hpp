#pragma once

#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "headroom/attention/attention.hpp"

namespace headroom::inline v0::detail {

/// Projections of tokens to q, k and v in one tensor [..., H+2Hk, D], attended along dimension `axis` of the leading
/// ones.
struct PackedProjection {
  torch::Tensor packed;
  int64_t heads, axis;

  /// q, k and v as they lie in `packed`, the sequence dimension behind the heads.
  std::array<torch::Tensor, 3> views() const {
    const auto part = [&](int64_t first, int64_t count) { return packed.narrow(-2, first, count).movedim(axis, -2); };
    const int64_t kv_heads = (packed.size(-2) - heads) / 2;
    return {part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)};
  }
  /// Another of the same shape and layout, for gradients.
  PackedProjection empty() const { return {torch::empty_like(packed), heads, axis}; }
};

/// Rotates q and k of packed projections in place: complex pairs of features times `rotation`, complex, broadcastable
/// to [..., H+Hk, D/2]. Narrow types are rotated in float.
inline void rotate_packed(const torch::Tensor& packed, int64_t heads, const torch::Tensor& rotation) {
  const torch::Tensor qk = packed.narrow(-2, 0, (packed.size(-2) + heads) / 2), wide = qk.to(compute_type(qk));
  torch::view_as_complex(wide.unflatten(-1, {-1, 2})).mul_(rotation);
  if (!wide.is_same(qk)) qk.copy_(wide);
}

/// Writes the gradients of q, k and v into `targets`, of any strides, and returns those of what is added to scores.
template <class Backend>
AttentionGradients gradients_into(const AttentionInputs& in, const AttentionForward& forward,
                                  const torch::Tensor& grad_output, const WantedGradients& wanted,
                                  const std::array<torch::Tensor, 3>& targets) {
  const auto& [q, k, v] = targets;
  if constexpr (std::is_same_v<Backend, TiledBackend>) {
    AttentionGradients grad{q, k, v};
    TiledBackend::write_gradients(in, forward, {grad_output}, wanted, grad);
    return grad;
  } else {
    AttentionGradients grad = Backend::backward(in, forward, {grad_output}, wanted);
    q.copy_(std::exchange(grad.q, {}));
    k.copy_(std::exchange(grad.k, {}));
    v.copy_(std::exchange(grad.v, {}));
    return grad;
  }
}

/// Self-attention over one projection that holds q, k and v, by a backend as AttentionFunction takes it: nothing is
/// copied on the way in, and backward gives one gradient, packed as well. `packed` is rotated in place, so with a
/// rotation it must not be used elsewhere.
template <class Backend>
struct PackedAttention : torch::autograd::Function<PackedAttention<Backend>> {
  using Optional = std::optional<torch::Tensor>;

  /// `differentiable`: packed, and what of the request may have a gradient.
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList differentiable,
                               const Optional& rotation, int64_t axis, AttentionRequest request) {
    const torch::Tensor& packed = differentiable[0];
    if (rotation.has_value()) rotate_packed(packed, request.heads(), *rotation);
    const auto views = PackedProjection{packed, request.heads(), axis}.views();
    const AttentionForward result = attention_result([&] {
      return Backend::forward({views[0], views[1], views[2], request});
    });
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
    const at::TensorList all(saved);
    const torch::Tensor &packed = saved[0], &rotation = saved[3];
    const AttentionForward forward{saved[1], saved[2], all.slice(4 + AttentionRequest::kTensors).vec()};
    const AttentionRequest request = saved_request(ctx, all.slice(4, AttentionRequest::kTensors));
    const PackedProjection projection{packed, request.heads(), ctx->saved_data["axis"].toInt()};
    WantedGradients wanted{true, true, true};  // of q, k and v there is only the whole
    torch::autograd::variable_list inputs{grad_output[0], packed};
    for (size_t i = 3, edge = 1; i < wanted.size(); ++i) {
      inputs.push_back(saved[i + 1]);
      wanted[i] = saved[i + 1].defined() && ctx->needs_input_grad(edge++);
    }
    const auto computed = first_derivatives(inputs, [&]() -> torch::autograd::variable_list {
      const auto views = projection.views();
      const AttentionInputs in{views[0], views[1], views[2], request};
      const PackedProjection target = projection.empty();
      const AttentionGradients grad =
          gradients_into<Backend>(in, forward, grad_output[0].resolve_neg(), wanted, target.views());
      if (rotation.defined()) rotate_packed(target.packed, request.heads(), rotation.conj());
      return {target.packed, grad.bias,         grad.relative_bias, grad.alibi_slopes,
              grad.sink,     grad.score_tables, grad.polar_phase};
    });
    torch::autograd::variable_list grads{computed[0]};
    append_differentiable(grads, all.slice(4, AttentionRequest::kDifferentiable),
                          {computed.begin() + 1, computed.end()});
    grads.resize(grads.size() + 3);  // rotation, axis and request have no gradient
    return grads;
  }

  static torch::Tensor run(const torch::Tensor& packed, const Optional& rotation, int64_t axis,
                           const AttentionRequest& request) {
    const auto differentiable = with_differentiable({packed}, request);
    return PackedAttention::apply(at::TensorList(differentiable), rotation, axis, AttentionRequest(request))
        .movedim(-2, axis);
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
    const auto [q, k, v] = PackedProjection{packed, heads, axis}.views();
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
  const auto [q, k, v] = PackedProjection{rotated, heads, axis}.views();
  return run_attention(q, k, v, options, /*with_lse=*/false).output.movedim(-2, axis);
}
#endif

}  // namespace headroom::inline v0::detail
