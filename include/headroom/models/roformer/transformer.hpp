#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/stack.hpp"
#include "headroom/models/roformer/attention.hpp"
#include "headroom/models/roformer/parts.hpp"
#include "headroom/nn/linear_self_attention.hpp"

namespace headroom::inline v0::models {

/// x + linear(gelu(linear(norm(x)))), four times as wide in between. Parameters are net.0.gamma, net.1.{weight,bias}
/// and net.4.{weight,bias}.
class RoformerFeedForwardImpl : public torch::nn::Module {
 public:
  RoformerFeedForwardImpl(int64_t dim, double dropout)
      : dropout_(dropout), norm_(detail::gamma_norm(dim)), widen_(dim, 4 * dim), narrow_(4 * dim, dim) {
    const torch::nn::Dropout drop(dropout);
    net = register_module("net", torch::nn::ModuleList(norm_, widen_, torch::nn::GELU(), drop, narrow_, drop));
  }

  /// x [..., dim] -> same shape. Saves x and the input of GELU; with dropout x alone, and computes the rest again.
  torch::Tensor forward(const torch::Tensor& x) {
    if (is_training() && dropout_ > 0) {
      return checkpoint(
          [norm = norm_, widen = widen_, narrow = narrow_, p = dropout_](const torch::Tensor& x) mutable {
            auto chain = detail::normed(x, norm);
            detail::append(chain, widen);
            const torch::Tensor hidden =
                torch::dropout(torch::gelu(nn::detail::run(std::move(chain))), p, /*train=*/true);
            return x + torch::dropout(narrow->forward(hidden), p, /*train=*/true);
          },
          x);
    }
    auto chain = detail::normed(x, norm_);
    detail::append(chain, widen_);
    detail::append(chain, narrow_);
    chain.residual = x;
    return nn::detail::run(std::move(chain));
  }

  torch::nn::ModuleList net{nullptr};

 private:
  double dropout_;
  nn::RMSNorm norm_;
  nn::Linear widen_, narrow_;
};
TORCH_MODULE(RoformerFeedForward);

struct RoformerTransformerOptions {
  TORCH_ARG(GatedAttentionOptions, attention) = {};
  TORCH_ARG(int64_t, depth) = 1;
  TORCH_ARG(double, ff_dropout) = 0;
  /// A norm after the last block.
  TORCH_ARG(bool, norm_output) = false;
};

/// `depth` blocks of attention and feed-forward network along one axis of tokens [B,T,K,dim], or along all tokens where
/// attention is linear. Parameters are layers.I.0.… (attention), layers.I.1.… (feed-forward) and norm.gamma.
class RoformerTransformerImpl : public torch::nn::Module {
 public:
  /// Without `rotary` (an empty holder), attention is linear.
  RoformerTransformerImpl(const RoformerTransformerOptions& options, const RotaryEmbedding& rotary) {
    const GatedAttentionOptions& attention = options.attention();
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.depth(); ++i) {
      feed_forwards_.emplace_back(attention.dim(), options.ff_dropout());
      torch::nn::ModuleList layer;
      if (rotary.is_empty()) {
        linear_attentions_.emplace_back(nn::LinearSelfAttentionOptions(attention.dim(), attention.heads())
                                            .head_dim(attention.head_dim())
                                            .dropout(attention.dropout()));
        layer->push_back(linear_attentions_.back());
      } else {
        attentions_.emplace_back(attention, rotary);
        layer->push_back(attentions_.back());
      }
      layer->push_back(feed_forwards_.back());
      layers->push_back(layer);
    }
    if (options.norm_output()) norm = register_module("norm", detail::gamma_norm(attention.dim()));
  }

  /// The blocks for run_stack(), over tokens [B,T,K,dim]: attention along dimension `axis`, with this `rotation`.
  std::vector<StackBlock> blocks(int64_t axis, const torch::Tensor& rotation) const {
    std::vector<StackBlock> all;
    for (size_t i = 0; i < feed_forwards_.size(); ++i) {
      StackBlock block;
      block.stages.push_back(attentions_.empty() ? linear_stage(linear_attentions_[i])
                                                 : attention_stage(attentions_[i], axis, rotation));
      block.stages.push_back(token_wise(feed_forwards_[i]));
      if (!norm.is_empty() && i + 1 == feed_forwards_.size()) block.stages.push_back(token_wise(norm));
      all.push_back(std::move(block));
    }
    return all;
  }

  torch::nn::ModuleList layers{nullptr};
  nn::RMSNorm norm{nullptr};  // empty without norm_output

 private:
  static StackBlock::Stage attention_stage(const GatedAttention& attention, int64_t axis,
                                           const torch::Tensor& rotation) {
    return {[attention = attention.ptr(), axis, rotation](const torch::Tensor& x) {
              return attention->forward(x, axis, rotation);
            },
            attention->parameters(),
            {0, 3 - axis}};
  }
  static StackBlock::Stage linear_stage(const nn::LinearSelfAttention& attention) {
    return {[attention = attention.ptr()](const torch::Tensor& x) {
              return x + attention->forward(x.flatten(1, 2)).view_as(x);  // [B,T·K,dim]
            },
            attention->parameters(),
            {0}};
  }
  template <class Holder>
  static StackBlock::Stage token_wise(const Holder& module) {
    return {[module = module.ptr()](const torch::Tensor& x) { return module->forward(x); },
            module->parameters(),
            {0, 1, 2}};
  }

  std::vector<GatedAttention> attentions_;  // these or those
  std::vector<nn::LinearSelfAttention> linear_attentions_;
  std::vector<RoformerFeedForward> feed_forwards_;
};
TORCH_MODULE(RoformerTransformer);

}  // namespace headroom::inline v0::models
