#pragma once

#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::nn {

struct RMSNormOptions {
  RMSNormOptions(int64_t dim) : dim_(dim) {}
  /// Size of the last dimension.
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(double, eps) = 1e-6;
};

namespace detail {

/// Saves the input and one number a row, where a chain of operators would save three tensors of the input's size.
struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  /// [..., 1], at least float
  static torch::Tensor inverse_rms(const torch::Tensor& x, double eps) {
    const auto dtype = x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    const torch::Tensor norm = torch::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, /*keepdim=*/true, dtype);
    return (norm.square() / static_cast<double>(x.size(-1)) + eps).rsqrt();
  }
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                               const torch::Tensor& weight, double eps) {
    const torch::Tensor inverse = inverse_rms(x, eps);
    ctx->save_for_backward({x, weight, inverse});
    ctx->saved_data["eps"] = eps;
    return (x * inverse).mul_(weight);
  }
  // forward did: out = x·inverse·weight
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &x = saved[0], &weight = saved[1], &grad = grads[0];
    // for second derivatives the inverse has to depend on x
    const torch::Tensor inverse =
        torch::GradMode::is_enabled() ? inverse_rms(x, ctx->saved_data["eps"].toDouble()) : saved[2];
    const torch::Tensor normed = x * inverse;
    const torch::Tensor grad_normed = grad * weight;
    const torch::Tensor projection = (grad_normed * normed).mean(-1, /*keepdim=*/true);  // [...,1]
    return {(grad_normed - normed * projection) * inverse, (grad * normed).sum_to_size(weight.sizes()), {}};
  }
};

}  // namespace detail

/// x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019).
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(const RMSNormOptions& options) : options(options) { reset(); }

  void reset() override {
    require(options.dim() > 0, "headroom.nn.rms_norm.dim", "dim is ", options.dim(), ", expected a positive number");
    weight = register_parameter("weight", torch::ones({options.dim()}));
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::RMSNorm(" << options.dim() << ", eps=" << options.eps() << ")";
  }

  /// x [..., dim] -> [..., dim]
  torch::Tensor forward(const torch::Tensor& x) { return detail::RmsNormFunction::apply(x, weight, options.eps()); }

  RMSNormOptions options;
  torch::Tensor weight;  // [dim]
};
TORCH_MODULE(RMSNorm);

}  // namespace headroom::inline v0::nn
