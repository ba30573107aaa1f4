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
  /// Store only the input of each block and recompute the rest in the backward pass.
  TORCH_ARG(bool, gradient_checkpointing) = false;

 public:
  EncoderBlock block() const {
    return EncoderBlock(attention_.dim(), Attention(attention_), FeedForward(feed_forward_));
  }
};

namespace detail {

/// Runs a block along an axis, checkpointed or not; gradients are the same bit for bit.
inline torch::Tensor run_block(EncoderBlock& block, const torch::Tensor& x, int64_t axis, bool gradient_checkpointing) {
  const auto forward = [module = block.ptr(), axis](const torch::Tensor& input) {
    return module->forward(input, axis);
  };
  return gradient_checkpointing ? checkpoint(forward, x) : forward(x);
}

}  // namespace detail

/// Encoder blocks one after the other over tokens [..., L, dim].
class EncoderImpl : public torch::nn::Module {
 public:
  explicit EncoderImpl(const EncoderOptions& options) : options(options) {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.layers(); ++i) layers->push_back(options.block());
  }

  torch::Tensor forward(torch::Tensor x, int64_t axis = -2) {
    for (const auto& layer : *layers) {
      EncoderBlock block(std::dynamic_pointer_cast<EncoderBlock::ContainedType>(layer));
      x = detail::run_block(block, x, axis, options.gradient_checkpointing());
    }
    return x;
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

  torch::Tensor forward(torch::Tensor x) {
    for (size_t i = 0; i < axes_.size(); ++i) {
      x = detail::run_block(blocks_[i], x, axes_[i].second, options_.gradient_checkpointing());
    }
    return x;
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
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& layer : *layers) x = layer->as<AxialLayer>()->forward(x);
    return x;
  }

  EncoderOptions options;
  AxialLayerImpl::Axes axes;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(AxialEncoder);

}  // namespace headroom::inline v0::nn
