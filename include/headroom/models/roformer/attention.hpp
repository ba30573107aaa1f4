#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/attention/options.hpp"
#include "headroom/attention/packed.hpp"
#include "headroom/models/roformer/parts.hpp"
#include "headroom/models/roformer/positions.hpp"
#include "headroom/models/roformer/value_residual.hpp"
#include "headroom/nn/token_axis.hpp"

namespace headroom::inline v0::models {

/// Options of GatedAttention.
struct GatedAttentionOptions {
  /// Features of a token.
  TORCH_ARG(int64_t, dim) = 0;
  TORCH_ARG(int64_t, heads) = 8;
  /// Features of a head; heads · head_dim need not be dim.
  TORCH_ARG(int64_t, head_dim) = 64;
  /// Probability that a weight, and that a result, is dropped while training.
  TORCH_ARG(double, dropout) = 0;
  /// The tokens themselves are added to what attention gives.
  TORCH_ARG(bool, residual) = true;
  /// Whether the values of the first block along the axis are mixed into its own.
  TORCH_ARG(ValueResidual, value_residual) = ValueResidual::none;
  /// The gates of the values are named as in Mel-Band RoFormers.
  TORCH_ARG(bool, of_mel) = false;
  /// A token sees those as far away as this, and all see the first `global_tokens`, which see all; none: all see all.
  TORCH_ARG(std::optional<int64_t>, window) = std::nullopt;
  TORCH_ARG(int64_t, global_tokens) = 0;
  TORCH_ARG(AttentionBackend, backend) = AttentionBackend::automatic;
};

/// Where the tokens of a call are attended.
struct AttentionPlace {
  int64_t axis;
  torch::Tensor positions;                         ///< of the position embedding: table(x.size(axis))
  std::shared_ptr<FirstValues> first_values = {};  ///< for value residuals
};

/// x + attention of the tokens' norms, with rotary or polar position embedding, each head times the sigmoid of a gate
/// that the query's token opens. Parameters are norm.gamma, rotary_embed.freqs or pope_embed.{inv_freqs,bias},
/// to_qkv.weight, to_gates.{weight,bias}, to_out.0.weight, and those of ValueMix.
class GatedAttentionImpl : public torch::nn::Module {
 public:
  /// `positions`, one of the two embeddings, may be shared with other layers.
  GatedAttentionImpl(const GatedAttentionOptions& options, PositionEmbedding positions)
      : options(options), positions(std::move(positions)) {
    if (!this->positions.rotary.is_empty()) register_module("rotary_embed", this->positions.rotary);
    if (!this->positions.polar.is_empty()) register_module("pope_embed", this->positions.polar);
    const int64_t dim = options.dim(), inner = options.heads() * options.head_dim();
    norm = register_module("norm", detail::gamma_norm(dim));
    to_qkv = register_module("to_qkv", detail::unbiased(dim, 3 * inner));
    values_ = ValueMix(*this, options.value_residual(), dim, options.heads(), options.of_mel());
    to_gates = register_module("to_gates", nn::Linear(dim, options.heads()));
    project_ = detail::unbiased(inner, dim);
    to_out = register_module("to_out", torch::nn::ModuleList(project_, torch::nn::Dropout(options.dropout())));
  }

  /// x [..., dim] -> same shape. Saves x, q, k and v, what attention gives with its log-sum-exp, and the gates; where
  /// values are mixed its own beside.
  torch::Tensor forward(const torch::Tensor& x, const AttentionPlace& place) {
    const int64_t sequence = nn::detail::token_axis(x, place.axis, options.dim(), "headroom.nn.attention.shape");
    const double dropout = is_training() ? options.dropout() : 0;
    const torch::Tensor heads = attended(projected(x, place), sequence, place.positions, dropout);  // [...,H,D]
    auto chain = detail::normed(x, norm);
    detail::append(chain, to_gates);
    chain = {.x = heads.flatten(-2), .gates = nn::detail::run(std::move(chain)), .weights = {project_->weight}};
    if (dropout > 0) {
      const torch::Tensor given = torch::dropout(nn::detail::run(std::move(chain)), dropout, /*train=*/true);
      return options.residual() ? x + given : given;
    }
    if (options.residual()) chain.residual = x;
    return nn::detail::run(std::move(chain));
  }

  GatedAttentionOptions options;
  PositionEmbedding positions;
  nn::RMSNorm norm{nullptr};
  nn::Linear to_qkv{nullptr}, to_gates{nullptr};
  torch::nn::ModuleList to_out{nullptr};

 private:
  /// [..., 3·H, D]
  torch::Tensor projected(const torch::Tensor& x, const AttentionPlace& place) const {
    auto chain = detail::normed(x, norm);
    detail::append(chain, to_qkv);
    const torch::Tensor all = nn::detail::run(std::move(chain)).unflatten(-1, {-1, options.head_dim()});
    const torch::Tensor own = all.narrow(-2, 2 * options.heads(), options.heads()),
                        values = values_.forward(own, x, norm, place.first_values.get());
    if (values_.changes()) own.copy_(values);
    return all;
  }

  /// projected [..., 3·H, D] -> [..., H, D]
  torch::Tensor attended(const torch::Tensor& projected, int64_t axis, const torch::Tensor& table,
                         double dropout) const {
    auto request = AttentionOptions().dropout(dropout).backend(options.backend());
    if (options.window().has_value()) {
      request.window(AttentionWindow{*options.window(), *options.window()}).global_keys(options.global_tokens());
    }
    if (!positions.polar.is_empty()) {
      request.polar(table).polar_phase(positions.polar->phase());
      return headroom::detail::packed_attention(projected, options.heads(), std::nullopt, axis, request);
    }
    std::vector<int64_t> shape(projected.dim() - axis, 1);  // the sequence, dimensions behind it, head, pair
    shape.front() = table.size(0);
    shape.back() = table.size(1);
    return headroom::detail::packed_attention(projected, options.heads(), table.view(shape), axis, request);
  }

  ValueMix values_;
  nn::Linear project_{nullptr};
};
TORCH_MODULE(GatedAttention);

}  // namespace headroom::inline v0::models
