#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <numbers>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/nn/rotary.hpp"

// Position embeddings of RoFormers, each shared by the layers along an axis; files store them with every layer.
namespace headroom::inline v0::models {

/// The frequencies of rotary position embedding, which published files store with every layer: the buffer freqs [D/2].
class RotaryEmbeddingImpl : public torch::nn::Module {
 public:
  explicit RotaryEmbeddingImpl(int64_t head_dim) {
    require(head_dim > 0 && head_dim % 2 == 0, "headroom.models.options", "dim_head is ", head_dim,
            ", expected an even number: rotary embedding rotates pairs of features");
    const torch::Tensor exponents = torch::arange(0, head_dim, 2).to(torch::kFloat) / static_cast<double>(head_dim);
    freqs = register_buffer("freqs", torch::pow(10000, exponents).reciprocal());
  }

  /// The rotation by each position: complex [length, D/2]. Angles are computed in double.
  torch::Tensor table(int64_t length) const {
    const bool wide = freqs.scalar_type() == torch::kDouble;
    return nn::detail::rotations(length, freqs).to(wide ? torch::kComplexDouble : torch::kComplexFloat);
  }

  torch::Tensor freqs;  // [D/2]
};
TORCH_MODULE(RotaryEmbedding);

/// Polar position embedding (PoPE; Gopalakrishnan et al. 2025, arXiv:2509.10534), named as in the PyPI package
/// PoPE-pytorch: the buffer inv_freqs [D], and the parameter bias [heads, D], a phase of keys from -2π to 0.
class PolarEmbeddingImpl : public torch::nn::Module {
 public:
  PolarEmbeddingImpl(int64_t heads, int64_t head_dim) {
    require(heads > 0 && head_dim > 0, "headroom.models.options", "heads is ", heads, " and dim_head ", head_dim,
            "; expected positive numbers");
    const torch::Tensor exponents = torch::arange(head_dim).to(torch::kFloat) / static_cast<double>(head_dim);
    inv_freqs = register_buffer("inv_freqs", torch::pow(10000, -exponents));
    bias = register_parameter("bias", torch::zeros({heads, head_dim}));
  }

  /// The turns by each position, cosines and sines: [length, 2D]. Angles are computed in double.
  torch::Tensor table(int64_t length) const {
    const bool wide = inv_freqs.scalar_type() == torch::kDouble;
    return nn::detail::polar_turns(length, inv_freqs).to(wide ? torch::kDouble : torch::kFloat);
  }
  /// The bias within its bounds.
  torch::Tensor phase() const { return bias.clamp(-2 * std::numbers::pi, 0); }

  torch::Tensor inv_freqs;  // [D]
  torch::Tensor bias;       // [heads,D]
};
TORCH_MODULE(PolarEmbedding);

/// One of the two, or none.
struct PositionEmbedding {
  PositionEmbedding() = default;
  PositionEmbedding(RotaryEmbedding embedding) : rotary(std::move(embedding)) {}  // NOLINT: a holder is an embedding
  PositionEmbedding(PolarEmbedding embedding) : polar(std::move(embedding)) {}    // NOLINT

  bool is_empty() const { return rotary.is_empty() && polar.is_empty(); }
  torch::Tensor table(int64_t length) const { return polar.is_empty() ? rotary->table(length) : polar->table(length); }

  RotaryEmbedding rotary{nullptr};
  PolarEmbedding polar{nullptr};
};

}  // namespace headroom::inline v0::models
