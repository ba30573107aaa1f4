#pragma once

#include <ATen/autocast_mode.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/nn/chain_layout.hpp"
#include "headroom/nn/gated_rows.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::nn::detail {

/// The dtype that autocast computes products of tensors like x in; none where it is off.
inline std::optional<torch::ScalarType> autocast_type(const torch::Tensor& x) {
  const auto device = compute_device(x).type();
  const bool on = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  return on ? std::optional(at::autocast::get_autocast_dtype(device)) : std::nullopt;
}

/// A chain by LibTorch's operators, on whole tensors of any device and dtype.
///
/// Autocast stays out of it: the cast of a weight that is made without a graph must not get into autocast's cache,
/// where others would find it.
class ChainByOperators {
 public:
  /// `cast_to`: the dtype to which operands of products are cast as autocast casts them; none: to no other.
  explicit ChainByOperators(const TokenChain& chain, std::optional<torch::ScalarType> cast_to = {})
      : chain_(chain), cast_to_(cast_to) {}

  /// x [..., in] -> [..., out]. With gradients enabled, a graph of LibTorch's operators: any number of derivatives.
  ChainForward forward(const ChainRequest& request) const {
    const size_t layers = chain_.weights.size(), computed = request.output_wanted ? layers : layers - 1;
    ChainForward result;
    if (!request.output_wanted) result.out = torch::empty({0}, chain_.x.options());
    if (computed == 0) return result;
    const bool keeps = request.records || torch::GradMode::is_enabled();
    torch::Tensor x = chain_.gates.defined()         ? gated(chain_.x, chain_.gates)
                      : chain_.norm_weight.defined() ? RmsNormFunction::apply(chain_.x, chain_.norm_weight, chain_.eps)
                                                     : chain_.x;
    x = operand(x);
    for (size_t i = 0; i < computed; ++i) {
      torch::Tensor y = at::linear(x, operand(chain_.weights[i]),
                                   chain_.biases.empty() ? std::nullopt : std::optional(operand(chain_.biases[i])));
      x = torch::Tensor();  // not held while GELU makes the next one
      if (i + 1 == layers) {
        result.out = with_residual(std::move(y));
        break;
      }
      if (request.records) result.inputs_of_gelu.push_back(y);
      if (i + 1 < computed) x = keeps ? at::gelu(y) : at::gelu_(y);
    }
    return result;
  }

  /// The gradients of what is `wanted`, by the places of `layout`, without a graph; those of a residual of its own are
  /// not its concern. x [rows, in], grad [rows, out].
  torch::autograd::variable_list backward(const ChainLayout& layout, at::TensorList inputs_of_gelu,
                                          const torch::Tensor& grad, const std::vector<bool>& wanted) const {
    torch::autograd::variable_list result(layout.size());
    torch::Tensor g = grad.to(operand_type(chain_.weights.back()));
    for (int64_t i = layout.layers - 1;; --i) {
      const torch::Tensor& weight = chain_.weights[i];
      if (layout.has_biases && wanted[layout.bias(i)]) result[layout.bias(i)] = like(chain_.biases[i], g.sum(0));
      // forward did: y = x·wᵀ + b, and x = gelu(before), norm(x) or x
      if (wanted[layout.weight(i)]) {
        const torch::Tensor x = i > 0 ? at::gelu(inputs_of_gelu[i - 1]) : operand(first_input());
        result[layout.weight(i)] = like(weight, at::mm(g.t(), x));
      }
      if (!wants_before(layout, i, wanted)) return result;
      g = at::mm(g, operand(weight));
      if (i == 0) break;
      g = at::gelu_backward_out(g, g, inputs_of_gelu[i - 1]);
    }
    if (layout.has_norm) {
      std::tie(g, result[layout.norm()]) =
          rms_norm_gradients(g, chain_.x, chain_.norm_weight, chain_.eps, {wanted[0], wanted[layout.norm()]});
    }
    if (layout.has_gates) {
      const torch::Tensor open = chain_.gates.sigmoid(), by_head = g.unflatten(-1, {open.size(-1), -1});
      if (wanted[layout.gates()]) {
        const torch::Tensor sum = (by_head * chain_.x.unflatten(-1, {open.size(-1), -1})).sum(-1);
        result[layout.gates()] = like(chain_.gates, at::sigmoid_backward(sum, open));
      }
      g = (by_head * open.unsqueeze(-1)).flatten(-2);
    }
    if (!wanted[0]) return result;
    if (layout.residual_is_x) g = sum(std::move(g), grad);
    result[0] = like(chain_.x, g);
    return result;
  }

 private:
  /// As autocast casts: anything but double.
  torch::ScalarType operand_type(const torch::Tensor& x) const {
    return x.is_floating_point() && x.scalar_type() != torch::kDouble ? cast_to_.value_or(x.scalar_type())
                                                                      : x.scalar_type();
  }
  torch::Tensor operand(const torch::Tensor& x) const { return x.to(operand_type(x)); }
  static torch::Tensor like(const torch::Tensor& x, const torch::Tensor& gradient) {
    return gradient.to(x.scalar_type());
  }

  /// y + other; y is not used any more.
  static torch::Tensor sum(torch::Tensor y, const torch::Tensor& other) {
    return at::result_type(y, other) == y.scalar_type() ? y.add_(other) : y + other;
  }
  torch::Tensor with_residual(torch::Tensor y) const {
    return chain_.residual.defined() ? sum(std::move(y), chain_.residual) : y;
  }
  torch::Tensor first_input() const {
    if (chain_.gates.defined()) return gated(chain_.x, chain_.gates);
    return chain_.norm_weight.defined() ? normalized(chain_.x, chain_.norm_weight, chain_.eps) : chain_.x;
  }

  /// Whether anything is wanted that lies in front of a layer's product.
  static bool wants_before(const ChainLayout& layout, int64_t layer, const std::vector<bool>& wanted) {
    bool any = wanted[0] || (layout.has_norm && wanted[layout.norm()]) || (layout.has_gates && wanted[layout.gates()]);
    for (int64_t i = 0; i < layer; ++i) {
      any = any || wanted[layout.weight(i)] || (layout.has_biases && wanted[layout.bias(i)]);
    }
    return any;
  }

  const TokenChain& chain_;
  std::optional<torch::ScalarType> cast_to_;
};

}  // namespace headroom::inline v0::nn::detail
