#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/nn/encoder_stack.hpp"

namespace headroom::inline v0::nn {

/// Encoder blocks one after the other over tokens [..., L, dim].
class EncoderImpl : public torch::nn::Module {
 public:
  explicit EncoderImpl(const EncoderOptions& options) : options(options) {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.layers(); ++i) layers->push_back(options.block());
  }

  /// x [..., dim] -> same shape; `request` as in SelfAttention::forward, for all blocks.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2,
                        const std::optional<AttentionOptions>& request = {}) {
    std::vector<detail::BlockAlong> blocks;
    for (const auto& layer : *layers) {
      blocks.push_back({EncoderBlock(std::dynamic_pointer_cast<EncoderBlock::ContainedType>(layer)), axis, request});
    }
    return detail::run_encoder(blocks, x, options);
  }

  EncoderOptions options;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(Encoder);

/// What is asked of attention along an axis, by the axis's name, in the place of the options' request.
using AxisRequests = std::map<std::string, AttentionOptions>;

/// One layer of an AxialEncoder: a block for each axis, in order, under the axis's name.
class AxialLayerImpl : public torch::nn::Module {
 public:
  using Axes = std::vector<std::pair<std::string, int64_t>>;

  AxialLayerImpl(const EncoderOptions& options, Axes axes) : options_(options), axes_(std::move(axes)) {
    for (const auto& [name, axis] : axes_) blocks_.push_back(register_module(name, options.block()));
  }

  /// x [..., dim] -> same shape. Throws headroom.nn.encoder.axis.
  torch::Tensor forward(const torch::Tensor& x, const AxisRequests& requests = {}) {
    return detail::run_encoder(blocks(requests), x, options_);
  }

  std::vector<detail::BlockAlong> blocks(const AxisRequests& requests = {}) const {
    std::vector<detail::BlockAlong> all;
    size_t used = 0;
    for (size_t i = 0; i < axes_.size(); ++i) {
      const auto& [name, axis] = axes_[i];
      const auto given = requests.find(name);
      used += given != requests.end();
      all.push_back({blocks_[i], axis, given == requests.end() ? std::nullopt : std::optional(given->second)});
    }
    require(used == requests.size(), "headroom.nn.encoder.axis", "there are requests for ", requests.size(),
            " axes, of which the encoder has ", used, "; use the names that its axes were given");
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

  /// x [..., dim] -> same shape. Throws headroom.nn.encoder.axis.
  torch::Tensor forward(const torch::Tensor& x, const AxisRequests& requests = {}) {
    std::vector<detail::BlockAlong> blocks;
    for (const auto& layer : *layers) {
      for (const auto& along : layer->as<AxialLayer>()->blocks(requests)) blocks.push_back(along);
    }
    return detail::run_encoder(blocks, x, options);
  }

  EncoderOptions options;
  AxialLayerImpl::Axes axes;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(AxialEncoder);

}  // namespace headroom::inline v0::nn
