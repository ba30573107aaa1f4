#pragma once

#include <torch/nn/modules/container/modulelist.h>

#include <vector>

#include "headroom/nn/linear.hpp"

namespace headroom::inline v0::nn {

/// Options of FeedForward.
struct FeedForwardOptions {
  FeedForwardOptions(int64_t dim, std::vector<int64_t> hidden) : dim_(dim), hidden_(std::move(hidden)) {}
  /// Features in and out.
  TORCH_ARG(int64_t, dim);
  /// Widths of the hidden layers, one or more.
  TORCH_ARG(std::vector<int64_t>, hidden);
  /// Biases of all its layers.
  TORCH_ARG(bool, bias) = true;
};

/// Linear, GELU, Linear, GELU, …, Linear through the hidden widths.
class FeedForwardImpl : public torch::nn::Cloneable<FeedForwardImpl> {
 public:
  explicit FeedForwardImpl(const FeedForwardOptions& options) : options(options) { reset(); }

  void reset() override {
    require(!options.hidden().empty(), "headroom.nn.feed_forward.hidden", "no hidden widths; give one or more");
    layers = register_module("layers", torch::nn::ModuleList());
    int64_t width = options.dim();
    const auto append = [&](int64_t next) {
      require(next > 0, "headroom.nn.feed_forward.hidden", "a width is ", next, ", expected positive numbers");
      layers->push_back(Linear(torch::nn::LinearOptions(width, next).bias(options.bias())));
      width = next;
    };
    for (const int64_t hidden : options.hidden()) append(hidden);
    append(options.dim());
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::FeedForward(" << options.dim() << ", hidden=" << at::IntArrayRef(options.hidden()) << ")";
  }

  /// x [..., dim] -> [..., dim]. Saves x, under autocast its cast, and the input of each GELU.
  torch::Tensor forward(const torch::Tensor& x) { return detail::run(chain(x)); }

  /// x + forward(norm(x)); neither norm(x) nor the sum's terms are stored.
  torch::Tensor forward_residual(const torch::Tensor& x, const RMSNorm& norm) {
    detail::TokenChain chain = this->chain(x);
    chain.residual = x;
    chain.norm_weight = norm->weight;
    chain.eps = norm->options.eps();
    return detail::run(chain);
  }

  FeedForwardOptions options;
  torch::nn::ModuleList layers{nullptr};

 private:
  detail::TokenChain chain(const torch::Tensor& x) const {
    detail::TokenChain chain{.x = x};
    for (const auto& module : *layers) {
      const auto* const layer = module->as<Linear>();
      chain.weights.push_back(layer->weight);
      if (layer->bias.defined()) chain.biases.push_back(layer->bias);
    }
    return chain;
  }
};
TORCH_MODULE(FeedForward);

}  // namespace headroom::inline v0::nn
