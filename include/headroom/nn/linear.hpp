#pragma once

#include <torch/nn/init.h>
#include <torch/nn/options/linear.h>

#include <cmath>
#include <optional>

#include "headroom/nn/token_chain.hpp"

namespace headroom::inline v0::nn {

/// x·weightᵀ + bias: torch::linear with the matrix products of whichever of LibTorch and headroom's register tile is
/// faster for the shape on this machine, forward and backward. The first product of a shape is measured (about ten
/// times its time) and the choice is kept, so that within a process equal operands give equal bits; another process may
/// choose otherwise when both are equally fast.
/// x [..., in], weight [out, in], bias [out] or none -> [..., out]; saves x. Anything but float on the CPU, autocast
/// and second derivatives are LibTorch's operators. Throws headroom.nn.linear.shape.
inline torch::Tensor linear(const torch::Tensor& x, const torch::Tensor& weight,
                            const std::optional<torch::Tensor>& bias = {}) {
  return detail::run({.x = x, .weights = {weight}, .biases = detail::bias_list(bias.value_or(torch::Tensor()))});
}

/// torch::nn::Linear (its options, parameters and initialisation) computed by nn::linear.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& options) : options(options) { reset(); }

  void reset() override {
    weight = register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
    bias = register_parameter("bias", options.bias() ? torch::empty({options.out_features()}) : torch::Tensor(),
                              options.bias());
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    const double bound = options.in_features() > 0 ? 1 / std::sqrt(options.in_features()) : 0;
    if (bias.defined()) torch::nn::init::uniform_(bias, -bound, bound);
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::Linear(" << options.in_features() << ", " << options.out_features() << std::boolalpha
           << ", bias=" << options.bias() << ")";
  }

  /// x [..., in] -> [..., out]
  torch::Tensor forward(const torch::Tensor& x) { return nn::linear(x, weight, bias); }

  torch::nn::LinearOptions options;
  torch::Tensor weight;  // [out,in]
  torch::Tensor bias;    // [out], undefined without
};
TORCH_MODULE(Linear);

}  // namespace headroom::inline v0::nn
