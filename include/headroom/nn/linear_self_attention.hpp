#pragma once

#include <torch/nn/modules/container/moduledict.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "headroom/attention/linear.hpp"
#include "headroom/nn/linear.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/nn/token_axis.hpp"

namespace headroom::inline v0::nn {

/// Options of LinearSelfAttention.
struct LinearSelfAttentionOptions {
  LinearSelfAttentionOptions(int64_t dim, int64_t heads) : dim_(dim), heads_(heads) {}
  /// Features of a token.
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, heads);
  /// Features of a head; heads · head_dim need not be dim.
  TORCH_ARG(int64_t, head_dim) = 32;
  /// Factor of the scores before the learned temperature of their head.
  TORCH_ARG(double, scale) = 8.0;
  /// Probability that a weight is dropped while training.
  TORCH_ARG(double, dropout) = 0.0;
};

/// The linear attention of BS-RoFormer implementations (lucidrains' and those that follow it,
/// linear_transformer_depth): norm, projection, headroom::linear_attention with a learned temperature for each head,
/// projection; no biases. Parameters are named as there: norm.gamma, to_qkv.0.weight, temperature, to_out.1.weight.
/// Works along one dimension of a tensor of tokens, all others being batch, where it lies.
class LinearSelfAttentionImpl : public torch::nn::Cloneable<LinearSelfAttentionImpl> {
 public:
  LinearSelfAttentionImpl(int64_t dim, int64_t heads)
      : LinearSelfAttentionImpl(LinearSelfAttentionOptions(dim, heads)) {}
  explicit LinearSelfAttentionImpl(const LinearSelfAttentionOptions& options) : options(options) { reset(); }

  void reset() override {
    require(options.dim() > 0 && options.heads() > 0 && options.head_dim() > 0, "headroom.nn.linear_attention.options",
            "dim is ", options.dim(), ", heads ", options.heads(), ", head_dim ", options.head_dim(),
            "; expected positive numbers");
    const int64_t inner = options.heads() * options.head_dim();
    norm = register_module("norm", detail::gamma_norm(options.dim()));
    const auto projection = [&](const char* name, const std::string& place, int64_t in, int64_t out) {
      using Modules = std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>;
      const Linear linear(torch::nn::LinearOptions(in, out).bias(false));
      return register_module(name, torch::nn::ModuleDict(Modules{{place, linear.ptr()}}));
    };
    to_qkv = projection("to_qkv", "0", options.dim(), 3 * inner);
    temperature = register_parameter("temperature", torch::ones({options.heads(), 1, 1}));
    to_out = projection("to_out", "1", inner, options.dim());
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::LinearSelfAttention(" << options.dim() << ", heads=" << options.heads()
           << ", head_dim=" << options.head_dim() << ")";
  }

  /// Values [..., H, D] in the place of a layer's own.
  using ValueChange = std::function<torch::Tensor(const torch::Tensor& values)>;

  /// x [..., dim] with at least one token dimension -> same shape; attends along dimension `axis`, with values that
  /// `change` may change.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2, const ValueChange& change = {}) {
    const int64_t sequence = detail::token_axis(x, axis, options.dim(), "headroom.nn.linear_attention.shape");
    const auto parts = detail::run({.x = x,
                                    .norm_weight = norm->weight,
                                    .eps = norm->options.eps(),
                                    .weights = {to_qkv["0"]->as<Linear>()->weight}})
                           .unflatten(-1, {3, options.heads(), options.head_dim()})
                           .unbind(-3);                                                          // 3 of [...,H,D]
    const auto by_head = [&](const torch::Tensor& part) { return part.movedim(sequence, -2); };  // [...,H,L,D]
    const torch::Tensor values = change ? change(parts[2]) : parts[2];
    const torch::Tensor attended = linear_attention(by_head(parts[0]), by_head(parts[1]), by_head(values),
                                                    LinearAttentionOptions()
                                                        .scale(options.scale())
                                                        .log_temperature(temperature.flatten())
                                                        .dropout(is_training() ? options.dropout() : 0.0));
    return nn::linear(attended.movedim(-2, sequence).flatten(-2), to_out["1"]->as<Linear>()->weight);
  }

  LinearSelfAttentionOptions options;
  RMSNorm norm{nullptr};
  torch::nn::ModuleDict to_qkv{nullptr}, to_out{nullptr};
  torch::Tensor temperature;  // [H,1,1], the logarithm of a factor
};
TORCH_MODULE(LinearSelfAttention);

}  // namespace headroom::inline v0::nn
