#pragma once

#include <ATen/Parallel.h>
#include <torch/arg.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <tuple>

#include "headroom/core/error.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::nn {

/// Options of RMSNorm.
struct RMSNormOptions {
  RMSNormOptions(int64_t dim) : dim_(dim) {}
  /// Size of the last dimension.
  TORCH_ARG(int64_t, dim);
  /// Is added to the mean of squares.
  TORCH_ARG(double, eps) = 1e-6;
  /// What the weight is called in files; some models say gamma.
  TORCH_ARG(std::string, weight_name) = "weight";
};

namespace detail {

/// 1 / sqrt(mean(x²) + eps) of each row: [..., 1], at least float.
inline torch::Tensor inverse_rms(const torch::Tensor& x, double eps) {
  const auto dtype = x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const torch::Tensor norm = torch::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, /*keepdim=*/true, dtype);
  return (norm.square() / static_cast<double>(x.size(-1)) + eps).rsqrt();
}

using Row = Eigen::Map<Eigen::ArrayXf>;
using ConstRow = Eigen::Map<const Eigen::ArrayXf>;
using DoubleRow = Eigen::Map<Eigen::ArrayXd>;

inline float inverse_rms(const ConstRow& x, double eps) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(x.square().mean()) + eps));
}

inline constexpr int64_t kNormRows = 64;  ///< rows of a task

/// out = x·inverse·weight for each row; x and out [rows, dim] dense floats on the CPU.
inline void normalize_rows(const torch::Tensor& x, const torch::Tensor& weight, double eps, const torch::Tensor& out) {
  if (is_dry(x)) return;
  const int64_t dim = x.size(1);
  const ConstRow w(weight.const_data_ptr<float>(), dim);
  const float* const from = x.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), kNormRows, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const ConstRow row(from + r * dim, dim);
      Row(to + r * dim, dim) = row * inverse_rms(row, eps) * w;
    }
  });
}

/// Where the gradients of normalize_rows go: that of x [rows, dim] is written, that of the weight [dim] added to;
/// undefined: not wanted. `through` (undefined or [rows, dim]) is added to that of x.
struct NormGradients {
  torch::Tensor x, weight, through = {};
};

/// The sum over the rows has the same order for any number of threads.
// forward did: out = x·inverse·weight
inline void normalize_rows_backward(const torch::Tensor& grad, const torch::Tensor& x, const torch::Tensor& weight,
                                    double eps, const NormGradients& gradients) {
  const auto& [grad_x, grad_weight, through] = gradients;
  const int64_t rows = x.size(0), dim = x.size(1), tasks = (rows + kNormRows - 1) / kNormRows;
  const torch::Tensor sums = grad_weight.defined() ? torch::zeros({tasks, dim}, torch::kDouble) : torch::Tensor();
  if (is_dry(x)) return;
  const ConstRow w(weight.const_data_ptr<float>(), dim);
  const auto row_of = [dim](const torch::Tensor& t, int64_t r) {
    return ConstRow(t.const_data_ptr<float>() + r * dim, dim);
  };
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first * kNormRows; r < std::min(last * kNormRows, rows); ++r) {
      const ConstRow x_row = row_of(x, r), g = row_of(grad, r);
      const float inverse = inverse_rms(x_row, eps);
      if (sums.defined()) {
        DoubleRow(sums.mutable_data_ptr<double>() + r / kNormRows * dim, dim) += (g * x_row * inverse).cast<double>();
      }
      if (!grad_x.defined()) continue;
      const float projection = (g * w * x_row).mean() * inverse * inverse;
      Row to(grad_x.mutable_data_ptr<float>() + r * dim, dim);
      to = (g * w - x_row * projection) * inverse;
      if (through.defined()) to += row_of(through, r);
    }
  });
  if (!grad_weight.defined()) return;
  Eigen::ArrayXd total = Eigen::ArrayXd::Zero(dim);
  for (int64_t task = 0; task < tasks; ++task) total += DoubleRow(sums.mutable_data_ptr<double>() + task * dim, dim);
  Row(grad_weight.mutable_data_ptr<float>(), dim) += total.cast<float>();
}

/// Rows that the loops above can read.
inline bool has_float_rows(const torch::Tensor& x) {
  return compute_device(x).is_cpu() && x.layout() == torch::kStrided && x.scalar_type() == torch::kFloat &&
         x.numel() > 0;
}

/// x·inverse·weight over the last dimension, in x's dtype; no graph.
HEADROOM_KERNEL torch::Tensor normalized(const torch::Tensor& x, const torch::Tensor& weight, double eps);

/// The gradients of x and weight after normalized(); those that are not wanted are undefined. With a graph where
/// gradients are enabled.
HEADROOM_KERNEL std::tuple<torch::Tensor, torch::Tensor> rms_norm_gradients(const torch::Tensor& grad,
                                                                            const torch::Tensor& x,
                                                                            const torch::Tensor& weight, double eps,
                                                                            const std::array<bool, 2>& wanted);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor normalized(const torch::Tensor& x, const torch::Tensor& weight, double eps) {
  if (!has_float_rows(x) || !has_float_rows(weight)) {
    return (x * inverse_rms(x, eps)).mul_(weight).to(x.scalar_type());
  }
  const torch::Tensor rows = x.contiguous().view({-1, x.size(-1)}), out = torch::empty_like(rows);
  normalize_rows(rows, weight.contiguous(), eps, out);
  return out.view(x.sizes());
}

// forward did: out = x·inverse·weight
HEADROOM_KERNEL std::tuple<torch::Tensor, torch::Tensor> rms_norm_gradients(const torch::Tensor& grad,
                                                                            const torch::Tensor& x,
                                                                            const torch::Tensor& weight, double eps,
                                                                            const std::array<bool, 2>& wanted) {
  const auto [wants_x, wants_weight] = wanted;
  torch::Tensor grad_x, grad_weight;
  if (has_float_rows(x) && has_float_rows(weight) && has_float_rows(grad) && !torch::GradMode::is_enabled()) {
    const torch::Tensor rows = x.contiguous().view({-1, x.size(-1)});
    if (wants_x) grad_x = torch::empty_like(rows);
    if (wants_weight) grad_weight = torch::zeros_like(weight);
    normalize_rows_backward(grad.contiguous().view(rows.sizes()), rows, weight.contiguous(), eps,
                            {grad_x, grad_weight});
    return {wants_x ? grad_x.view(x.sizes()) : grad_x, grad_weight};
  }
  const torch::Tensor inverse = inverse_rms(x, eps);  // depends on x, for second derivatives
  const torch::Tensor normed = x * inverse;
  if (wants_weight) grad_weight = (grad * normed).sum_to_size(weight.sizes()).to(weight.scalar_type());
  if (!wants_x) return {grad_x, grad_weight};
  grad_x = grad * weight.to(inverse.scalar_type());                              // of normed
  const torch::Tensor projection = (grad_x * normed).sum(-1, /*keepdim=*/true);  // [...,1]
  const double share = -1.0 / static_cast<double>(x.size(-1));
  grad_x = torch::GradMode::is_enabled() ? grad_x.addcmul(normed, projection, share) * inverse
                                         : grad_x.addcmul_(normed, projection, share).mul_(inverse);
  return {grad_x.to(x.scalar_type()), grad_weight};
}
#endif

/// Saves the input alone, where a chain of operators would save three tensors of the input's size.
struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& x,
                               const torch::Tensor& weight, double eps) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return normalized(x, weight, eps);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight] =
        rms_norm_gradients(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble(),
                           {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
    return {grad_x, grad_weight, {}};
  }
};

}  // namespace detail

/// x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019).
class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(const RMSNormOptions& options) : options(options) { reset(); }

  void reset() override {
    require(options.dim() > 0, "headroom.nn.rms_norm.dim", "dim is ", options.dim(), ", expected a positive number");
    weight = register_parameter(options.weight_name(), torch::ones({options.dim()}));
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::RMSNorm(" << options.dim() << ", eps=" << options.eps() << ")";
  }

  /// x [..., dim] -> [..., dim]
  torch::Tensor forward(const torch::Tensor& x) {
    require(x.dim() >= 1 && x.size(-1) == options.dim(), "headroom.nn.rms_norm.shape", "x is ", x.sizes(),
            ", expected [...,", options.dim(), "]");
    return detail::RmsNormFunction::apply(x, weight, options.eps());
  }

  RMSNormOptions options;
  torch::Tensor weight;  // [dim]
};
TORCH_MODULE(RMSNorm);

namespace detail {

/// x / |x|·sqrt(dim)·gamma, with norms below 1e-12 counted as that: the norm of RoFormers and of linear attention.
inline RMSNorm gamma_norm(int64_t dim) {
  return RMSNorm(RMSNormOptions(dim).eps(1e-24 / static_cast<double>(dim)).weight_name("gamma"));
}

}  // namespace detail

}  // namespace headroom::inline v0::nn
