#pragma once

#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/nn/options/activation.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <tuple>

#include "headroom/attention/options.hpp"
#include "headroom/core/error.hpp"
#include "headroom/nn/layer_scale.hpp"
#include "headroom/nn/linear.hpp"
#include "headroom/nn/multihead_attention.hpp"
#include "headroom/nn/token_chain.hpp"
#include "headroom/nn/token_norm.hpp"

namespace headroom::inline v0::nn {

/// Options of CrossTransformerLayer.
struct CrossTransformerLayerOptions {
  CrossTransformerLayerOptions(int64_t dim, int64_t heads) : dim_(dim), heads_(heads) {}
  /// Features of a token.
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, heads);
  /// Width of the feed-forward network; 0: four times dim.
  TORCH_ARG(int64_t, hidden) = 0;
  /// GELU in the feed-forward network, else ReLU.
  TORCH_ARG(bool, gelu) = true;
  /// Probability that an attention weight, an activation and a result of either branch is dropped while training.
  TORCH_ARG(double, dropout) = 0;
  /// Norms before the branches, else after their sums.
  TORCH_ARG(bool, norm_first) = true;
  /// The norms of the branches are over all tokens of an example together.
  TORCH_ARG(bool, group_norm) = false;
  /// With norm_first, the layer ends with a norm over all tokens of an example together.
  TORCH_ARG(bool, norm_out) = true;
  /// Learned factors of the branches, 1e-4 at first.
  TORCH_ARG(bool, layer_scale) = true;
  TORCH_ARG(AttentionBackend, attention) = AttentionBackend::automatic;
};

/// x + attention, then x + feed-forward network, over tokens that attend each other or those of another stream.
/// Parameters are self_attn.* or cross_attn.* (those of MultiheadAttention), linear1, linear2, norm1, norm2, with cross
/// attention norm3, norm_out, gamma_1.scale and gamma_2.scale, as demucs names them. Before its branches cross
/// attention has norm1 of the queries, norm2 of the keys and norm3 of the network; behind them norm1 and norm2.
class CrossTransformerLayerImpl : public torch::nn::Module {
 public:
  enum class Attends { itself, another };

  /// Throws headroom.nn.attention.heads and headroom.nn.cross_transformer.options.
  CrossTransformerLayerImpl(const CrossTransformerLayerOptions& options, Attends attends)
      : options(options), attends_(attends) {
    const int64_t dim = options.dim(), hidden = options.hidden() > 0 ? options.hidden() : 4 * dim;
    require(options.dropout() >= 0 && options.dropout() < 1, "headroom.nn.cross_transformer.options", "dropout is ",
            options.dropout(), ", expected a probability below 1");
    const bool crosses = attends == Attends::another;
    attention =
        register_module(crosses ? "cross_attn" : "self_attn",
                        MultiheadAttention(MultiheadAttentionOptions(dim, options.heads()).dropout(options.dropout())));
    attention->backend = options.attention();
    linear1 = register_module("linear1", Linear(dim, hidden));
    linear2 = register_module("linear2", Linear(hidden, dim));
    const NormOver over = options.group_norm() ? NormOver::example : NormOver::token;
    norm1 = register_module("norm1", TokenNorm(dim, over));
    norm2 = register_module("norm2", TokenNorm(dim, over));
    if (crosses) norm3 = register_module("norm3", TokenNorm(dim, over));
    if (options.norm_first() && options.norm_out()) {
      norm_out = register_module("norm_out", TokenNorm(dim, NormOver::example));
    }
    if (!options.layer_scale()) return;
    constexpr double kStart = 1e-4;
    gamma_1 = register_module("gamma_1", LayerScale(dim, kStart));
    gamma_2 = register_module("gamma_2", LayerScale(dim, kStart));
  }

  /// x [B,L,dim] and the other stream [B,K,dim], which cross attention sees -> [B,L,dim]
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& other) {
    const bool crosses = attends_ == Attends::another;
    if (!options.norm_first()) {
      const torch::Tensor y = norm1->forward(sum(x, attend(x, crosses ? other : x), gamma_1));
      return norm2->forward(sum(y, feed(y), gamma_2));
    }
    const torch::Tensor queries = norm1->forward(x);
    torch::Tensor y = sum(x, attend(queries, crosses ? norm2->forward(other) : queries), gamma_1);
    y = sum(y, feed((crosses ? norm3 : norm2)->forward(y)), gamma_2);
    return norm_out.is_empty() ? y : norm_out->forward(y);
  }

  CrossTransformerLayerOptions options;
  MultiheadAttention attention{nullptr};
  Linear linear1{nullptr}, linear2{nullptr};
  TokenNorm norm1{nullptr}, norm2{nullptr}, norm3{nullptr}, norm_out{nullptr};
  LayerScale gamma_1{nullptr}, gamma_2{nullptr};  // empty without layer_scale

 private:
  bool drops() const { return is_training() && options.dropout() > 0; }
  torch::Tensor dropped(const torch::Tensor& x) const {
    return drops() ? torch::dropout(x, options.dropout(), /*train=*/true) : x;
  }
  static torch::Tensor sum(const torch::Tensor& x, const torch::Tensor& branch, LayerScale& scale) {
    return scale.is_empty() ? x + branch : scale->forward(x, branch);
  }

  /// [B,L,dim] of queries and keys [B,K,dim]
  torch::Tensor attend(const torch::Tensor& queries, const torch::Tensor& keys) {
    const torch::Tensor q = queries.transpose(0, 1), k = keys.is_same(queries) ? q : keys.transpose(0, 1);
    return dropped(std::get<0>(attention->forward(q, k, k)).transpose(0, 1));
  }
  /// [B,L,dim] -> same shape
  torch::Tensor feed(const torch::Tensor& x) {
    if (options.gelu() && !drops()) {
      return detail::run(
          {.x = x, .weights = {linear1->weight, linear2->weight}, .biases = {linear1->bias, linear2->bias}});
    }
    const torch::Tensor hidden = linear1->forward(x);
    return dropped(linear2->forward(dropped(options.gelu() ? torch::gelu(hidden) : torch::relu(hidden))));
  }

  Attends attends_;
};
TORCH_MODULE(CrossTransformerLayer);

}  // namespace headroom::inline v0::nn
