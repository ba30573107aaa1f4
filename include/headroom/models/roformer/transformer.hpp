#pragma once

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/dropout.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/stack.hpp"
#include "headroom/models/roformer/attention.hpp"
#include "headroom/models/roformer/hyper_connection.hpp"
#include "headroom/models/roformer/parts.hpp"
#include "headroom/nn/linear_self_attention.hpp"

namespace headroom::inline v0::models {

/// x + linear(gelu(linear(norm(x)))), four times as wide in between. Parameters are net.0.gamma, net.1.{weight,bias}
/// and net.4.{weight,bias}.
class RoformerFeedForwardImpl : public torch::nn::Module {
 public:
  /// Without `residual` x is not added.
  RoformerFeedForwardImpl(int64_t dim, double dropout, bool residual = true)
      : dropout_(dropout),
        residual_(residual),
        norm_(detail::gamma_norm(dim)),
        widen_(dim, 4 * dim),
        narrow_(4 * dim, dim) {
    const torch::nn::Dropout drop(dropout);
    net = register_module("net", torch::nn::ModuleList(norm_, widen_, torch::nn::GELU(), drop, narrow_, drop));
  }

  /// x [..., dim] -> same shape. Saves x and the input of GELU; with dropout x alone, and computes the rest again.
  torch::Tensor forward(const torch::Tensor& x) {
    if (is_training() && dropout_ > 0) {
      const torch::Tensor given = checkpoint(
          [norm = norm_, widen = widen_, narrow = narrow_, p = dropout_](const torch::Tensor& x) mutable {
            auto chain = detail::normed(x, norm);
            detail::append(chain, widen);
            const torch::Tensor hidden =
                torch::dropout(torch::gelu(nn::detail::run(std::move(chain))), p, /*train=*/true);
            return torch::dropout(narrow->forward(hidden), p, /*train=*/true);
          },
          x);
      return residual_ ? x + given : given;
    }
    auto chain = detail::normed(x, norm_);
    detail::append(chain, widen_);
    detail::append(chain, narrow_);
    if (residual_) chain.residual = x;
    return nn::detail::run(std::move(chain));
  }

  torch::nn::ModuleList net{nullptr};

 private:
  double dropout_;
  bool residual_;
  nn::RMSNorm norm_;
  nn::Linear widen_, narrow_;
};
TORCH_MODULE(RoformerFeedForward);

/// Options of RoformerTransformer.
struct RoformerTransformerOptions {
  /// What the attention of each block is.
  TORCH_ARG(GatedAttentionOptions, attention) = {};
  /// Blocks.
  TORCH_ARG(int64_t, depth) = 1;
  /// Probability that an activation or result of a feed-forward network is dropped while training.
  TORCH_ARG(double, ff_dropout) = 0;
  /// A norm after the last block.
  TORCH_ARG(bool, norm_output) = false;
  /// Residual streams that hyper-connections mix. 0: none, and layers have no `branch` in their names.
  TORCH_ARG(int64_t, streams) = 0;
  /// Rounds of Sinkhorn's algorithm in the hyper-connections.
  TORCH_ARG(int64_t, sinkhorn_iters) = 2;
};

/// `depth` blocks of attention and feed-forward network along one axis of tokens [B,T,K,dim], or along all tokens where
/// attention is linear. Parameters are layers.I.0.… (attention), layers.I.1.… (feed-forward) and norm.gamma.
///
/// With S streams, tokens are [B·S,T,K,dim], the streams of an example one after the other. Along all tokens these are
/// what hyper-connections mix. Along an axis they mix S neighbours in the order of batch, stream and the other axis, as
/// the PyPI package bs-roformer 1.2 does.
class RoformerTransformerImpl : public torch::nn::Module {
 public:
  /// Without a position embedding attention is linear.
  RoformerTransformerImpl(const RoformerTransformerOptions& options, const PositionEmbedding& positions)
      : options(options) {
    const GatedAttentionOptions& attention = options.attention();
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.depth(); ++i) {
      torch::nn::ModuleList layer;
      layer->push_back(add_attention(i, positions));
      feed_forwards_.emplace_back(attention.dim(), options.ff_dropout(), options.streams() < 2);
      layer->push_back(connected(feed_forwards_.back().ptr()));
      layers->push_back(layer);
    }
    if (options.norm_output()) norm = register_module("norm", detail::gamma_norm(attention.dim()));
  }

  /// The blocks for run_stack(), over tokens [B,T,K,dim] of these `sizes`. The axis of `place` is 1 or 2; linear
  /// attention has neither axis nor positions.
  std::vector<StackBlock> blocks(const AttentionPlace& place, at::IntArrayRef sizes) const {
    std::vector<StackBlock> all;
    const int64_t axis = is_linear() ? 0 : place.axis;
    for (size_t i = 0; i < feed_forwards_.size(); ++i) {
      StackBlock block;
      const bool last = i + 1 == feed_forwards_.size();
      if (has_streams() && i == 0) block.stages.push_back(grouping_stage(axis));
      block.stages.push_back(attention_stage(i, place));
      block.stages.push_back(feed_forward_stage(i));
      if (!norm.is_empty() && last) block.stages.push_back(token_wise(norm));
      if (has_streams() && last) block.stages.push_back(ungrouping_stage(axis, sizes));
      // Streams and values of other blocks reach beyond a slice
      if (has_streams() || place.first_values != nullptr) {
        for (StackBlock::Stage& stage : block.stages) stage.independent_axes.clear();
      }
      all.push_back(std::move(block));
    }
    return all;
  }

  RoformerTransformerOptions options;
  torch::nn::ModuleList layers{nullptr};
  nn::RMSNorm norm{nullptr};  // empty without norm_output

 private:
  using Forward = std::function<torch::Tensor(const torch::Tensor&)>;

  bool is_linear() const { return !linear_attentions_.empty(); }
  bool has_streams() const { return options.streams() > 1; }

  /// Of block `i`: only the first one gives its values.
  std::shared_ptr<torch::nn::Module> add_attention(int64_t i, const PositionEmbedding& positions) {
    GatedAttentionOptions attention = options.attention();
    attention.residual(!has_streams());
    if (attention.value_residual() == ValueResidual::gives && i > 0) attention.value_residual(ValueResidual::none);
    if (!positions.is_empty()) return connected(attentions_.emplace_back(attention, positions).ptr());
    auto& linear = linear_attentions_.emplace_back(nn::LinearSelfAttentionOptions(attention.dim(), attention.heads())
                                                       .head_dim(attention.head_dim())
                                                       .dropout(attention.dropout()));
    // the package has m and r in the right order here
    const auto kind =
        attention.value_residual() == ValueResidual::transposes ? ValueResidual::mixes : attention.value_residual();
    linear_values_.emplace_back(*linear, kind, attention.dim(), attention.heads(), attention.of_mel());
    return connected(linear.ptr());
  }
  std::shared_ptr<torch::nn::Module> connected(std::shared_ptr<torch::nn::Module> branch) {
    if (options.streams() == 0) return branch;
    const auto number = static_cast<int64_t>(connections_.size());
    return connections_
        .emplace_back(HyperConnectionOptions()
                          .dim(options.attention().dim())
                          .streams(options.streams())
                          .sinkhorn_iters(options.sinkhorn_iters())
                          .first_stream(number % options.streams()),
                      std::move(branch))
        .ptr();
  }

  /// x -> x with what the branch gives; `number` counts the branches.
  StackBlock::Stage stage(size_t number, Forward branch, std::vector<int64_t> independent_axes) const {
    if (!has_streams()) {
      const torch::nn::ModuleListImpl& layer = *layers->ptr(number / 2)->as<torch::nn::ModuleList>();
      return {std::move(branch), layer.ptr(number % 2)->parameters(), std::move(independent_axes)};
    }
    const auto connection = connections_[number].ptr();
    return {[connection, branch = std::move(branch)](const torch::Tensor& x) { return connection->forward(x, branch); },
            connection->parameters(), std::move(independent_axes)};
  }
  StackBlock::Stage attention_stage(size_t i, const AttentionPlace& place) const {
    if (is_linear()) return linear_stage(i, place.first_values);
    AttentionPlace inner = place;
    if (has_streams()) inner.axis = 1;  // of [G,L,dim]
    return stage(
        2 * i,
        [attention = attentions_[i].ptr(), inner](const torch::Tensor& x) { return attention->forward(x, inner); },
        {0, 3 - place.axis});
  }
  StackBlock::Stage linear_stage(size_t i, const std::shared_ptr<FirstValues>& first) const {
    const auto forward = [attention = linear_attentions_[i].ptr(), mix = linear_values_[i], first,
                          residual = !has_streams()](const torch::Tensor& x) {
      const torch::Tensor tokens = residual ? x.flatten(1, 2) : x;  // [B,T·K,dim]
      const auto values = [&](const torch::Tensor& own) {
        return mix.forward(own, tokens, attention->norm, first.get());
      };
      const torch::Tensor given = attention->forward(tokens, 1, values);
      return residual ? x + given.view_as(x) : given;
    };
    return stage(2 * i, forward, {0});
  }
  StackBlock::Stage feed_forward_stage(size_t i) const {
    return stage(2 * i + 1, [module = feed_forwards_[i].ptr()](const torch::Tensor& x) { return module->forward(x); },
                 {0, 1, 2});
  }
  static StackBlock::Stage token_wise(const nn::RMSNorm& module) {
    return {[module = module.ptr()](const torch::Tensor& x) { return module->forward(x); },
            module->parameters(),
            {0, 1, 2}};
  }

  /// Tokens [B·S,T,K,dim] -> groups of streams [G,S,L,dim] with L along the axis; along all tokens for axis 0.
  StackBlock::Stage grouping_stage(int64_t axis) const {
    return {[axis, streams = options.streams()](const torch::Tensor& x) {
              const torch::Tensor by_axis = axis == 0 ? x.flatten(1, 2) : axis == 1 ? x.transpose(1, 2) : x;
              return by_axis.reshape({-1, streams, by_axis.size(-2), by_axis.size(-1)});
            },
            {},
            {}};
  }
  StackBlock::Stage ungrouping_stage(int64_t axis, at::IntArrayRef sizes) const {
    const int64_t time = sizes[1], bands = sizes[2];
    return {[axis, time, bands](const torch::Tensor& x) {
              const torch::Tensor tokens = axis == 1 ? x.reshape({-1, bands, time, x.size(-1)}).transpose(1, 2)
                                                     : x.reshape({-1, time, bands, x.size(-1)});
              return tokens.contiguous();
            },
            {},
            {}};
  }

  std::vector<GatedAttention> attentions_;  // these or those
  std::vector<nn::LinearSelfAttention> linear_attentions_;
  std::vector<ValueMix> linear_values_;  // of those
  std::vector<RoformerFeedForward> feed_forwards_;
  std::vector<HyperConnection> connections_;  // attention's and the feed-forward network's in turn; none without
};
TORCH_MODULE(RoformerTransformer);

}  // namespace headroom::inline v0::models
