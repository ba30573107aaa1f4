#pragma once

#include <torch/nn/modules/linear.h>

#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::nn {

struct FeedForwardOptions {
  FeedForwardOptions(int64_t dim, std::vector<int64_t> hidden) : dim_(dim), hidden_(std::move(hidden)) {}
  /// Features in and out.
  TORCH_ARG(int64_t, dim);
  /// Widths of the hidden layers, one or more.
  TORCH_ARG(std::vector<int64_t>, hidden);
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
      layers->push_back(torch::nn::Linear(torch::nn::LinearOptions(width, next).bias(options.bias())));
      width = next;
    };
    for (const int64_t hidden : options.hidden()) append(hidden);
    append(options.dim());
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::FeedForward(" << options.dim() << ", hidden=" << at::IntArrayRef(options.hidden()) << ")";
  }

  /// x [..., dim] -> [..., dim]
  torch::Tensor forward(torch::Tensor x) {
    const size_t last = layers->size() - 1;
    for (size_t i = 0; i < last; ++i) x = torch::gelu(layers[i]->as<torch::nn::Linear>()->forward(x));
    return layers[last]->as<torch::nn::Linear>()->forward(x);
  }

  FeedForwardOptions options;
  torch::nn::ModuleList layers{nullptr};
};
TORCH_MODULE(FeedForward);

}  // namespace headroom::inline v0::nn
