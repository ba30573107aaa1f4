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

/// Cosine and sine of angles, to be broadcast.
using Turns = std::array<torch::Tensor, 2>;

/// Features x [..., D] as complex numbers, all real parts before all imaginary ones: [..., 2D] in x's dtype. Narrow
/// types are computed in float, of which `turns` are.
inline torch::Tensor polar_pairs(const torch::Tensor& x, const Turns& turns) {
  const torch::Tensor magnitude = torch::softplus(x.to(compute_type(x)));
  return torch::cat({magnitude * turns[0], magnitude * turns[1]}, -1).to(x.scalar_type());
}

/// The gradients of x and of the angles, the latter of x's shape, where grad [..., 2D] is that of polar_pairs(x,
/// turns).
inline std::array<torch::Tensor, 2> polar_gradients(const torch::Tensor& grad, const torch::Tensor& x,
                                                    const Turns& turns) {
  const torch::Tensor wide = x.to(compute_type(x)), given = grad.to(wide.scalar_type());
  const auto& [cosine, sine] = turns;
  const auto halves = given.chunk(2, -1);
  const torch::Tensor along = (halves[0] * cosine).addcmul_(halves[1], sine);
  const torch::Tensor across = (halves[1] * cosine).addcmul_(halves[0], sine, -1);
  return {(along * wide.sigmoid()).to(x.scalar_type()), across * torch::softplus(wide)};
}

/// A packed projection with the positions of its tokens.
struct PolarProjection : PackedProjection {
  PolarPositions positions;

  /// Of the angles of q and k, computed in double: [L, 1 …, H+Hk, D].
  Turns turns() const {
    const torch::Tensor of_q = positions.angles.unsqueeze(1);  // [L,1,D]
    const torch::Tensor of_k = of_q + positions.phase.to(of_q.scalar_type());
    std::vector<int64_t> shape(packed.dim() - axis, 1);
    shape.front() = of_q.size(0);
    shape.end()[-2] = heads + kv_heads();
    shape.end()[-1] = of_q.size(2);
    const auto all = [&](const torch::Tensor& q, const torch::Tensor& k) {
      return torch::cat({q.expand({-1, heads, -1}), k}, 1).to(compute_type(packed)).view(shape);
    };
    return {all(of_q.cos(), of_k.cos()), all(of_q.sin(), of_k.sin())};
  }
  /// Tensors of the shapes that attention gets, without memory of their own, for checks.
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
    const PolarProjection projection{{packed, request.heads(), axis}, {angles, phase}};
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
    const PolarProjection projection{{saved[0], request.heads(), ctx->saved_data["axis"].toInt()},
                                     {saved[2], saved[1]}};
    const AttentionForward forward{saved[3], saved[4], {saved.begin() + 5, saved.end()}};
    const auto computed =
        first_derivatives({grad_output[0], saved[0], saved[1]}, [&]() -> torch::autograd::variable_list {
          return gradients(projection, request, forward, grad_output[0].resolve_neg());
        });
    return {computed[0], computed[1], {}, {}, {}};
  }

 private:
  static AttentionForward attended(const PolarProjection& projection, const AttentionRequest& request) {
    const auto [q, k, v] = projection.views(polar_pairs(projection.qk(), projection.turns()), projection.packed);
    return Backend::forward(AttentionInputs{q, k, v, request});
  }

  /// Of the packed projections and of the phase.
  static torch::autograd::variable_list gradients(const PolarProjection& projection, const AttentionRequest& request,
                                                  const AttentionForward& forward, const torch::Tensor& grad_output) {
    const torch::Tensor qk = projection.qk(), &phase = projection.positions.phase;
    const Turns turns = projection.turns();
    const torch::Tensor grad_packed = torch::empty_like(projection.packed);
    torch::Tensor grad_qk;
    {
      const torch::Tensor both = polar_pairs(qk, turns);
      grad_qk = torch::empty_like(both);
      const auto [q, k, v] = projection.views(both, projection.packed);
      gradients_into<Backend>(AttentionInputs{q, k, v, request}, forward, grad_output, {true, true, true},
                              projection.views(grad_qk, grad_packed));
    }
    const auto [of_features, of_angles] = polar_gradients(grad_qk, qk, turns);
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
  const PolarProjection projection{{packed, heads, axis}, positions};
  const torch::Tensor result =
      by_kernel(projection.stand_ins(), options, [&](auto backend, const AttentionRequest& request) {
        return PolarAttention<decltype(backend)>::apply(packed, positions.phase, positions.angles, axis,
                                                        AttentionRequest(request))
            .movedim(-2, axis);
      });
  if (result.defined()) return result;
  const auto [q, k, v] = projection.views(polar_pairs(projection.qk(), projection.turns()), packed);
  return run_attention(q, k, v, options, /*with_lse=*/false).output.movedim(-2, axis);
}
#endif

}  // namespace headroom::inline v0::detail
