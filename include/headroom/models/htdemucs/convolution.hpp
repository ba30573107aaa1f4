#pragma once

#include <torch/arg.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <utility>
#include <vector>

namespace headroom::inline v0::models {

/// Options of Convolution.
struct ConvolutionOptions {
  ConvolutionOptions(int64_t in, int64_t out, std::vector<int64_t> kernel)
      : in_(in), out_(out), kernel_(std::move(kernel)), stride_(kernel_.size(), 1), padding_(kernel_.size(), 0) {}
  /// Channels.
  TORCH_ARG(int64_t, in);
  TORCH_ARG(int64_t, out);
  /// For each axis that the convolution slides along, one or two.
  TORCH_ARG(std::vector<int64_t>, kernel);
  TORCH_ARG(std::vector<int64_t>, stride);
  TORCH_ARG(std::vector<int64_t>, padding);
  /// Of all axes.
  TORCH_ARG(int64_t, dilation) = 1;
  /// The transposed convolution, which has no padding.
  TORCH_ARG(bool, transposed) = false;
};

/// LibTorch's convolutions, along one axis or two and transposed or not, as one module: waveforms and spectra go
/// through layers of one kind. Parameters and their initialisation are those of torch::nn::Conv1d and its like.
class ConvolutionImpl : public torch::nn::Module {
 public:
  explicit ConvolutionImpl(const ConvolutionOptions& options) : options(options) {
    std::vector<int64_t> sizes = {options.out(), options.in()};
    if (options.transposed()) std::swap(sizes[0], sizes[1]);
    sizes.insert(sizes.end(), options.kernel().begin(), options.kernel().end());
    weight = register_parameter("weight", torch::empty(sizes));
    bias = register_parameter("bias", torch::empty({options.out()}));
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    const double bound = 1 / std::sqrt(static_cast<double>(weight[0].numel()));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::models::Convolution(" << options.in() << ", " << options.out()
           << ", kernel=" << at::IntArrayRef(options.kernel()) << ", stride=" << at::IntArrayRef(options.stride())
           << (options.transposed() ? ", transposed" : "") << ")";
  }

  /// x [B,in,…] -> [B,out,…]
  torch::Tensor forward(const torch::Tensor& x) {
    const bool along_two = options.kernel().size() == 2;
    const auto &stride = options.stride(), &padding = options.padding();
    if (options.transposed()) {
      return along_two ? torch::conv_transpose2d(x, weight, bias, stride)
                       : torch::conv_transpose1d(x, weight, bias, stride);
    }
    return along_two ? torch::conv2d(x, weight, bias, stride, padding, options.dilation())
                     : torch::conv1d(x, weight, bias, stride, padding, options.dilation());
  }

  ConvolutionOptions options;
  torch::Tensor weight;  // [out,in,…], transposed [in,out,…]
  torch::Tensor bias;    // [out]
};
TORCH_MODULE(Convolution);

}  // namespace headroom::inline v0::models
