#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "headroom/attention/options.hpp"
#include "headroom/attention/packed.hpp"
#include "headroom/models/roformer/parts.hpp"
#include "headroom/nn/rotary.hpp"
#include "headroom/nn/token_axis.hpp"

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

struct GatedAttentionOptions {
  /// Features of a token.
  TORCH_ARG(int64_t, dim) = 0;
  TORCH_ARG(int64_t, heads) = 8;
  /// Features of a head; heads · head_dim need not be dim.
  TORCH_ARG(int64_t, head_dim) = 64;
  /// Probability that a weight, and that a result, is dropped while training.
  TORCH_ARG(double, dropout) = 0;
  TORCH_ARG(AttentionBackend, backend) = AttentionBackend::automatic;
};

/// x + attention of the tokens' norms, with rotary position embedding, each head times the sigmoid of a gate that the
/// query's token opens. Parameters are norm.gamma, rotary_embed.freqs, to_qkv.weight, to_gates.{weight,bias} and
/// to_out.0.weight.
class GatedAttentionImpl : public torch::nn::Module {
 public:
  /// `rotary` may be shared with other layers.
  GatedAttentionImpl(const GatedAttentionOptions& options, RotaryEmbedding rotary)
      : options(options),
        rotary_embed(register_module("rotary_embed", std::move(rotary))),
        norm(register_module("norm", detail::gamma_norm(options.dim()))) {
    const int64_t dim = options.dim(), inner = options.heads() * options.head_dim();
    to_qkv = register_module("to_qkv", detail::unbiased(dim, 3 * inner));
    to_gates = register_module("to_gates", nn::Linear(dim, options.heads()));
    project_ = detail::unbiased(inner, dim);
    to_out = register_module("to_out", torch::nn::ModuleList(project_, torch::nn::Dropout(options.dropout())));
  }

  /// x [..., dim] -> same shape, attending along dimension `axis`; `rotation` is rotary_embed->table(x.size(axis)).
  /// Saves x, q, k and v, what attention gives with its log-sum-exp, and the gates.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis, const torch::Tensor& rotation) {
    const int64_t sequence = nn::detail::token_axis(x, axis, options.dim(), "headroom.nn.attention.shape");
    const double dropout = is_training() ? options.dropout() : 0;
    auto chain = detail::normed(x, norm);
    detail::append(chain, to_qkv);
    const torch::Tensor heads = attended(nn::detail::run(std::move(chain)), sequence, rotation, dropout);  // [...,H,D]
    chain = detail::normed(x, norm);
    detail::append(chain, to_gates);
    chain = {.x = heads.flatten(-2), .gates = nn::detail::run(std::move(chain)), .weights = {project_->weight}};
    if (dropout > 0) return x + torch::dropout(nn::detail::run(std::move(chain)), dropout, /*train=*/true);
    chain.residual = x;
    return nn::detail::run(std::move(chain));
  }

  GatedAttentionOptions options;
  RotaryEmbedding rotary_embed{nullptr};
  nn::RMSNorm norm{nullptr};
  nn::Linear to_qkv{nullptr}, to_gates{nullptr};
  torch::nn::ModuleList to_out{nullptr};

 private:
  /// projected [..., 3·H·D] -> [..., H, D]
  torch::Tensor attended(const torch::Tensor& projected, int64_t axis, const torch::Tensor& rotation,
                         double dropout) const {
    std::vector<int64_t> shape(projected.dim() - axis + 1, 1);  // the sequence, dimensions behind it, head, pair
    shape.front() = rotation.size(0);
    shape.back() = rotation.size(1);
    return headroom::detail::packed_attention(projected.unflatten(-1, {-1, options.head_dim()}), options.heads(),
                                              rotation.view(shape), axis,
                                              AttentionOptions().dropout(dropout).backend(options.backend()));
  }

  nn::Linear project_{nullptr};
};
TORCH_MODULE(GatedAttention);

}  // namespace headroom::inline v0::models
