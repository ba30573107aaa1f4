#pragma once

#include <torch/types.h>

#include <array>

#include "headroom/attention/backend.hpp"
#include "headroom/attention/positions.hpp"
#include "headroom/attention/tiled_tensors.hpp"

// Polar position embedding (PoPE; Gopalakrishnan et al. 2025, arXiv:2509.10534) on tensors, for backends whose kernels
// don't know it: a feature of q or k becomes a complex number. Its magnitude, softplus of the feature, says what is
// there; its angle says where: that of its position's row in a table, and for keys a learned phase more. The score of a
// pair is the real part of q·conj(k), the same as a product of twice as many real features.
namespace headroom::inline v0::detail {

/// Cosine and sine of angles, broadcastable to [..., L, D].
using Turns = std::array<torch::Tensor, 2>;

/// By `rows` of a table [P, 2D], in `dtype`; for keys with a phase more, [..., Hk, D] or undefined, which may
/// have a gradient.
inline Turns polar_turns(const torch::Tensor& table, const torch::Tensor& rows, const torch::Tensor& phase,
                         torch::ScalarType dtype) {
  const auto turns = table.index_select(0, rows).to(dtype).chunk(2, -1);
  const torch::Tensor &cosine = turns[0], &sine = turns[1];
  if (!phase.defined()) return {cosine, sine};
  const torch::Tensor wide = phase.to(torch::kDouble).unsqueeze(-2);
  const torch::Tensor of_phase = wide.cos().to(dtype), across = wide.sin().to(dtype);
  return {cosine * of_phase - sine * across, sine * of_phase + cosine * across};
}

/// Features x [..., D] as complex numbers, all real parts before all imaginary ones: [..., 2D] in x's dtype. Narrow
/// types are computed in float, of which `turns` are.
inline torch::Tensor polar_pairs(const torch::Tensor& x, const Turns& turns) {
  const torch::Tensor magnitude = torch::softplus(x.to(compute_type(x)));
  return torch::cat({magnitude * turns[0], magnitude * turns[1]}, -1).to(x.scalar_type());
}

/// The gradient of x, in its dtype, where grad [..., 2D] is that of polar_pairs(x, turns).
inline torch::Tensor feature_gradient(const torch::Tensor& grad, const torch::Tensor& x, const Turns& turns) {
  const torch::Tensor wide = x.to(compute_type(x));
  const auto halves = grad.to(wide.scalar_type()).chunk(2, -1);
  const torch::Tensor along = (halves[0] * turns[0]).addcmul_(halves[1], turns[1]);
  return (along * wide.sigmoid()).to(x.scalar_type());
}
/// That of the phases of x [..., Hk, L, D], summed in double to `sizes` [..., Hk, D].
inline torch::Tensor phase_gradient(const torch::Tensor& grad, const torch::Tensor& x, const Turns& turns,
                                    at::IntArrayRef sizes) {
  const torch::Tensor wide = x.to(compute_type(x));
  const auto halves = grad.to(wide.scalar_type()).chunk(2, -1);
  const torch::Tensor across = (halves[1] * turns[0]).addcmul_(halves[0], turns[1], -1);
  return (across * torch::softplus(wide)).sum(-2, /*keepdim=*/false, torch::kDouble).sum_to_size(sizes);
}

/// Of all rows of q and of k in a request, on the device and in the type of computation of q.
struct RequestTurns {
  Turns q, k;

  RequestTurns(const AttentionRequest& request, const torch::Tensor& like) {
    const TableRows rows(request);
    const auto turns_of = [&](const torch::Tensor& of_rows, const torch::Tensor& phase) {
      return polar_turns(request.polar, of_rows.to(like.device()), phase, compute_type(like));
    };
    q = turns_of(rows.query, {}), k = turns_of(rows.key, request.polar_phase);
  }
};

/// A request with polar positions as one without: q and k twice as wide.
class PolarInputs {
 public:
  explicit PolarInputs(const AttentionInputs& in) : given_(in), request_(in.request), turns_(in.request, in.q) {
    q_ = polar_pairs(in.q, turns_.q), k_ = polar_pairs(in.k, turns_.k);
    request_.polar = torch::Tensor(), request_.polar_phase = torch::Tensor();
  }
  AttentionInputs inputs() const { return {q_, k_, given_.v, request_}; }
  /// Gradients of what inputs() gives become those of what was given.
  AttentionGradients back(AttentionGradients grad, const WantedGradients& wanted) const {
    grad.q = feature_gradient(grad.q, given_.q, turns_.q);
    const torch::Tensor& phase = given_.request.polar_phase;
    if (wanted[8]) {
      grad.polar_phase = phase_gradient(grad.k, given_.k, turns_.k, phase.sizes()).to(phase.scalar_type());
    }
    grad.k = feature_gradient(grad.k, given_.k, turns_.k);
    return grad;
  }

 private:
  const AttentionInputs given_;
  AttentionRequest request_;
  RequestTurns turns_;
  torch::Tensor q_, k_;
};

}  // namespace headroom::inline v0::detail
