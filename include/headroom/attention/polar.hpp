#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "headroom/attention/attention.hpp"
#include "headroom/attention/packed.hpp"

// Polar position embedding (PoPE; Gopalakrishnan et al. 2025, arXiv:2509.10534): a feature of q or k becomes a complex
// number. Its magnitude, softplus of the feature, says what is there; its angle says where: the position times a
// frequency, and for keys a learned phase more. The score of a pair is the real part of q·conj(k):
//   sum over features d of softplus(q_d)·softplus(k_d)·cos((p_k - p_q)·frequency_d + phase_d)
namespace headroom::inline v0::detail {

/// Where the tokens of a sequence stand.
struct PolarPositions {
  torch::Tensor angles;  ///< [L, D] in double: position times frequency
  torch::Tensor phase;   ///< [Hk, D]: added to the angles of keys; may have a gradient
};

/// Features x [..., D] as complex numbers, all real parts before all imaginary ones: [..., 2D] in x's dtype. Angles, in
/// double, broadcast to x. Narrow types are computed in float.
inline torch::Tensor polar_pairs(const torch::Tensor& x, const torch::Tensor& angles) {
  const torch::Tensor magnitude = torch::softplus(x.to(compute_type(x)));
  const auto part = [&](const torch::Tensor& turn) { return magnitude * turn.to(magnitude.scalar_type()); };
  return torch::cat({part(angles.cos()), part(angles.sin())}, -1).to(x.scalar_type());
}

/// The gradients of x and of the angles, the latter of x's shape, where grad [..., 2D] is that of polar_pairs(x,
/// angles).
inline std::array<torch::Tensor, 2> polar_gradients(const torch::Tensor& grad, const torch::Tensor& x,
                                                    const torch::Tensor& angles) {
  const torch::Tensor wide = x.to(compute_type(x)), given = grad.to(wide.scalar_type());
  const torch::Tensor cosine = angles.cos().to(wide.scalar_type()), sine = angles.sin().to(wide.scalar_type());
  const auto halves = given.chunk(2, -1);
  const torch::Tensor along = (halves[0] * cosine).addcmul_(halves[1], sine);
  const torch::Tensor across = (halves[1] * cosine).addcmul_(halves[0], sine, -1);
  return {(along * wide.sigmoid()).to(x.scalar_type()), across * torch::softplus(wide)};
}

/// q, k and v in one tensor packed [..., H+2Hk, D], attended along its dimension `axis`, with their positions.
struct PolarProjection {
  torch::Tensor packed;
  PolarPositions positions;
  int64_t heads, axis;

  int64_t kv_heads() const { return (packed.size(-2) - heads) / 2; }
  torch::Tensor qk() const { return packed.narrow(-2, 0, heads + kv_heads()); }

  /// Of q and k, to be broadcast: [L, 1 …, H+Hk, D].
  torch::Tensor angles() const {
    const torch::Tensor of_q = positions.angles.unsqueeze(1);  // [L,1,D]
    const torch::Tensor all =
        torch::cat({of_q.expand({-1, heads, -1}), of_q + positions.phase.to(of_q.scalar_type())}, 1);
    std::vector<int64_t> shape(packed.dim() - axis, 1);
    shape.front() = all.size(0);
    shape.end()[-2] = all.size(1);
    shape.end()[-1] = all.size(2);
    return all.view(shape);
  }
  /// q and k [..., L, 2D] of `qk` [..., H+Hk, 2D], and v [..., L, D] of `values`, which is like `packed`. No copy.
  std::array<torch::Tensor, 3> views(const torch::Tensor& qk, const torch::Tensor& values) const {
    const auto part = [&](const torch::Tensor& x, int64_t first, int64_t count) {
      return x.narrow(-2, first, count).movedim(axis, -2);
    };
    return {part(qk, 0, heads), part(qk, heads, kv_heads()), part(values, heads + kv_heads(), kv_heads())};
  }
  /// Tensors of those shapes without memory of their own, for checks.
  std::array<torch::Tensor, 3> stand_ins() const {
    std::vector<int64_t> sizes = qk().sizes().vec();
    sizes.back() *= 2;
    return views(packed.new_empty({}).expand(sizes), packed);
  }
};

/// Attention with polar positions by a backend as AttentionFunction takes it. Saved for backward: the projections, the
/// output and the log-sum-exp; q and k in polar form, twice as wide, are there while one of the passes runs.
template <class Backend>
struct PolarAttention : torch::autograd::Function<PolarAttention<Backend>> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& packed,
                               const torch::Tensor& phase, const torch::Tensor& angles, int64_t axis,
                               AttentionRequest request) {
    const PolarProjection projection{packed, {angles, phase}, request.heads(), axis};
    const AttentionForward result = attention_result([&] { return attended(projection, request); });
    torch::autograd::variable_list saved{packed, phase, angles, result.output, result.lse};
    saved.insert(saved.end(), result.extra.begin(), result.extra.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["axis"] = axis;
    save_request(ctx, request);
    return result.output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad_output) {
    const auto saved = ctx->get_saved_variables();
    const AttentionRequest request = saved_request(ctx, {});
    const PolarProjection projection{saved[0], {saved[2], saved[1]}, request.heads(), ctx->saved_data["axis"].toInt()};
    const AttentionForward forward{saved[3], saved[4], {saved.begin() + 5, saved.end()}};
    const auto computed =
        first_derivatives({grad_output[0], saved[0], saved[1]}, [&]() -> torch::autograd::variable_list {
          return gradients(projection, request, forward, grad_output[0].resolve_neg());
        });
    return {computed[0], computed[1], {}, {}, {}};
  }

 private:
  static AttentionForward attended(const PolarProjection& projection, const AttentionRequest& request) {
    const auto [q, k, v] = projection.views(polar_pairs(projection.qk(), projection.angles()), projection.packed);
    return Backend::forward(AttentionInputs{q, k, v, request});
  }

  /// Of the packed projections and of the phase.
  static torch::autograd::variable_list gradients(const PolarProjection& projection, const AttentionRequest& request,
                                                  const AttentionForward& forward, const torch::Tensor& grad_output) {
    const torch::Tensor qk = projection.qk(), angles = projection.angles(), &phase = projection.positions.phase;
    const torch::Tensor grad_packed = torch::empty_like(projection.packed);
    torch::Tensor grad_qk;
    {
      const torch::Tensor both = polar_pairs(qk, angles);
      grad_qk = torch::empty_like(both);
      const auto [q, k, v] = projection.views(both, projection.packed);
      gradients_into<Backend>(AttentionInputs{q, k, v, request}, forward, grad_output, {true, true, true},
                              projection.views(grad_qk, grad_packed));
    }
    const auto [of_features, of_angles] = polar_gradients(grad_qk, qk, angles);
    grad_packed.narrow(-2, 0, qk.size(-2)).copy_(of_features);
    const torch::Tensor of_keys = of_angles.narrow(-2, projection.heads, projection.kv_heads());
    return {grad_packed, of_keys.sum_to_size(phase.sizes()).to(phase.scalar_type())};
  }
};

/// packed [..., H+2Hk, D] -> [..., H, D]: attention of so many heads H with polar positions along dimension `axis`
/// (counted from the front) of the leading ones. The scale is 1/sqrt(D) unless given; `options` has no tensors.
HEADROOM_KERNEL torch::Tensor polar_attention(const torch::Tensor& packed, int64_t heads,
                                              const PolarPositions& positions, int64_t axis, AttentionOptions options);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor polar_attention(const torch::Tensor& packed, int64_t heads,
                                              const PolarPositions& positions, int64_t axis, AttentionOptions options) {
  if (!options.scale().has_value()) options.scale(1 / std::sqrt(static_cast<double>(packed.size(-1))));
  const PolarProjection projection{packed, positions, heads, axis};
  const auto run = [&](auto backend, const AttentionRequest& request) {
    return PolarAttention<decltype(backend)>::apply(packed, positions.phase, positions.angles, axis,
                                                    AttentionRequest(request))
        .movedim(-2, axis);
  };
  {
    const auto [q, k, v] = projection.stand_ins();
    const auto request = AttentionRequest::check(q, k, v, options);
    switch (resolve_backend(q, request, options.backend())) {
      case AttentionBackend::tiled:
        return run(TiledBackend(), request);
      case AttentionBackend::fused:
        return run(FusedBackend(), request);
      case AttentionBackend::chunked:
        return run(ChunkedBackend(), request);
      default:
        break;
    }
  }
  const auto [q, k, v] = projection.views(polar_pairs(projection.qk(), projection.angles()), packed);
  return run_attention(q, k, v, options, /*with_lse=*/false).output.movedim(-2, axis);
}
#endif

}  // namespace headroom::inline v0::detail
