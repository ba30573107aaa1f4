#pragma once

#include <string>
#include <utility>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/nn/encoder_block.hpp"

namespace headroom::inline v0::nn {

struct EncoderOptions {
  EncoderOptions(int64_t dim, int64_t heads, std::vector<int64_t> ffn_hidden, int64_t layers)
      : attention_(dim, heads), feed_forward_(dim, std::move(ffn_hidden)), layers_(layers) {}
  TORCH_ARG(AttentionOptions, attention);
  TORCH_ARG(FeedForwardOptions, feed_forward);
  TORCH_ARG(int64_t, layers);
  /// What of the blocks is kept for the backward pass; true: the input of each block, the rest is computed again.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
  /// Two streams, y1 = x1 + attention(x2), y2 = x2 + feed_forward(y1), from which backward computes all activations
  /// back: another model than without, with the same parameters. Both streams start as the input, the output is their
  /// mean.
  TORCH_ARG(bool, reversible) = false;

 public:
  EncoderBlock block() const {
    return EncoderBlock(attention_.dim(), Attention(attention_), FeedForward(feed_forward_));
  }
};

namespace detail {

/// The parameters of one half of a block.
inline std::vector<torch::Tensor> parameters_of(const RMSNorm& norm, const torch::nn::Module& branch) {
  std::vector<torch::Tensor> all = branch.parameters();
  all.push_back(norm->weight);
  return all;
}

}  // namespace detail

/// A block of a stack for run_stack(), over tokens of `dims` dimensions: attention along `axis`, with the others as
/// batch, and the feed-forward network, with all as batch.
template <TokenMixer Attention, TokenWise FeedForward>
StackBlock stack_block(const BasicEncoderBlock<Attention, FeedForward>& block, int64_t axis, int64_t dims) {
  std::vector<int64_t> others, all;
  for (int64_t d = 0; d + 1 < dims; ++d) {
    all.push_back(d);
    if (d != (axis < 0 ? axis + dims : axis)) others.push_back(d);
  }
  const auto module = block.ptr();
  return {{{[module, axis](const torch::Tensor& x) { return module->attend(x, axis); },
            detail::parameters_of(module->attention_norm, *module->attention), others},
           {[module](const torch::Tensor& x) { return module->feed(x); },
            detail::parameters_of(module->feed_forward_norm, *module->feed_forward), all}}};
}

namespace detail {

/// A block and the dimension of the tokens that it attends along.
struct BlockAlong {
  EncoderBlock block;
  int64_t axis;
};

inline ReversibleLayer reversible_layer(const BlockAlong& along) {
  const auto block = along.block.ptr();
  return {
      {[block, axis = along.axis](const torch::Tensor& x) {
         return block->attention->forward(block->attention_norm->forward(x), axis);
       },
       parameters_of(block->attention_norm, *block->attention)},
      {[block](const torch::Tensor& x) { return block->feed_forward->forward(block->feed_forward_norm->forward(x)); },
       parameters_of(block->feed_forward_norm, *block->feed_forward)}};
}

/// Blocks one after the other, as the options say. The only place where an encoder runs its blocks.
inline torch::Tensor run_encoder(const std::vector<BlockAlong>& blocks, const torch::Tensor& x,
                                 const EncoderOptions& options) {
  const StackPolicy& policy = options.gradient_checkpointing();
  if (options.reversible()) {
    require(policy == StackPolicy(), "headroom.nn.encoder.reversible",
            "reversible is true and the checkpoint policy \"", policy.text(),
            "\"; a reversible encoder stores nothing that a checkpoint could save, leave the policy out");
    std::vector<ReversibleLayer> layers;
    for (const BlockAlong& along : blocks) layers.push_back(reversible_layer(along));
    const auto [first, second] = run_reversible(layers, x, x);
    return (first + second) * 0.5;
  }
  std::vector<StackBlock> stack;
  for (const auto& [block, axis] : blocks) {
    stack.push_back(stack_block(block, axis, x.dim()));
  }
  return run_stack(stack, x, policy);
}

}  // namespace detail

/// Encoder blocks one after the other over tokens [..., L, dim].
class EncoderImpl : public torch::nn::Module {
 public:
  explicit EncoderImpl(const EncoderOptions& options) : options(options) {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.layers(); ++i) layers->push_back(options.block());
  }

  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2) {
    std::vector<detail::BlockAlong> blocks;
    for (const auto& layer : *layers) {
      blocks.push_back({EncoderBlock(std::dynamic_pointer_cast<EncoderBlock::ContainedType>(layer)), axis});
    }
    return detail::run_encoder(blocks, x, options);
  }

  EncoderOptions options;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(Encoder);

/// One layer of an AxialEncoder: a block for each axis, in order, under the axis's name.
class AxialLayerImpl : public torch::nn::Module {
 public:
  using Axes = std::vector<std::pair<std::string, int64_t>>;

  AxialLayerImpl(const EncoderOptions& options, Axes axes) : options_(options), axes_(std::move(axes)) {
    for (const auto& [name, axis] : axes_) blocks_.push_back(register_module(name, options.block()));
  }

  torch::Tensor forward(const torch::Tensor& x) { return detail::run_encoder(blocks(), x, options_); }

  std::vector<detail::BlockAlong> blocks() const {
    std::vector<detail::BlockAlong> all;
    for (size_t i = 0; i < axes_.size(); ++i) all.push_back({blocks_[i], axes_[i].second});
    return all;
  }

 private:
  EncoderOptions options_;
  Axes axes_;
  std::vector<EncoderBlock> blocks_;
};
TORCH_MODULE(AxialLayer);

/// Encoder over tokens that lie on a grid: every layer attends along one axis after the other, each time with the other
/// axes as batch. The axes are attended where they lie.
class AxialEncoderImpl : public torch::nn::Module {
 public:
  /// `axes` names the token dimensions to attend along and their order, as {{"frequency", 2}, {"time", 1}} for
  /// tokens [B,T,F,dim]; the names become part of the parameter names (layers.0.frequency.attention…).
  AxialEncoderImpl(const EncoderOptions& options, AxialLayerImpl::Axes axes) : options(options), axes(std::move(axes)) {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.layers(); ++i) layers->push_back(AxialLayer(options, this->axes));
  }

  /// x [..., dim] -> same shape
  torch::Tensor forward(const torch::Tensor& x) {
    std::vector<detail::BlockAlong> blocks;
    for (const auto& layer : *layers) {
      for (const auto& along : layer->as<AxialLayer>()->blocks()) blocks.push_back(along);
    }
    return detail::run_encoder(blocks, x, options);
  }

  EncoderOptions options;
  AxialLayerImpl::Axes axes;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(AxialEncoder);

}  // namespace headroom::inline v0::nn
