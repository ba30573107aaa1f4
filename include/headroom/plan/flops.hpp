#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <string_view>

namespace headroom::inline v0 {

namespace detail {

using OperatorInputs = c10::ArrayRef<const c10::IValue>;

inline double numel_of(const c10::IValue& x) {
  return x.isTensor() && x.toTensor().defined() ? static_cast<double>(x.toTensor().numel()) : 0;
}

/// Of spatial dimension `d`, in a list of one number for each or one for all.
inline int64_t at_dim(at::IntArrayRef list, size_t d) { return list[list.size() == 1 ? 0 : d]; }

/// A convolution by its sizes: of the input [batch, channels, …], of the weight, then one number for all spatial
/// dimensions or one for each.
struct ConvolutionSizes {
  at::IntArrayRef input, weight, stride, padding, dilation;
  bool transposed;
};

/// 2·output·(inputs of an output).
inline double convolution_flops(const ConvolutionSizes& sizes) {
  const auto& [input, weight, stride, padding, dilation, transposed] = sizes;
  // Every element of the weight meets every position of the output, or of the input when transposed
  double positions = 1;
  for (size_t d = 2; d < input.size(); ++d) {
    const int64_t size = input[d], reach = at_dim(dilation, d - 2) * (weight[d] - 1) + 1;
    const int64_t margin = 2 * at_dim(padding, d - 2);
    positions *= static_cast<double>(transposed ? size : (size + margin - reach) / at_dim(stride, d - 2) + 1);
  }
  return 2 * static_cast<double>(input[0]) * positions * static_cast<double>(c10::multiply_integers(weight));
}

using FlopsFormula = double (*)(OperatorInputs);

/// What counts the floating-point operations of calls of an operator, such as "aten::mm", where a product and its sum
/// are two: of those that multiply matrices and transform; nullptr for the others. Attention counts every pair of a
/// query and a key, whether or not a mask hides it.
inline FlopsFormula flops_formula(std::string_view name) {
  using Inputs = OperatorInputs;
  static constexpr auto product = [](Inputs x, size_t a, size_t b) {  // [...,m,k] · [...,k,n]
    return 2 * numel_of(x[a]) * static_cast<double>(x[b].toTensor().size(-1));
  };
  static constexpr auto attention = [](Inputs x, size_t q, double of_dim, double of_value_dim) {
    const at::Tensor &query = x[q].toTensor(), &key = x[q + 1].toTensor(), &value = x[q + 2].toTensor();
    const double pairs = static_cast<double>(query.numel()) /
                         static_cast<double>(std::max<int64_t>(query.size(-1), 1)) * static_cast<double>(key.size(-2));
    return 2 * pairs *
           (of_dim * static_cast<double>(query.size(-1)) + of_value_dim * static_cast<double>(value.size(-1)));
  };
  static constexpr auto transform = [](Inputs x, double factor) {
    const at::Tensor& input = x[0].toTensor();
    double points = 1;
    for (const int64_t dim : x[1].toIntVector()) points *= static_cast<double>(input.size(dim));
    return factor * static_cast<double>(input.numel()) * std::log2(std::max(points, 2.0));
  };
  static constexpr auto chain = [](Inputs x, double factor) {  // x [rows, in], norm [in], weights [out, in]
    double sum = 0;
    for (size_t i = 1; i < x.size(); ++i) sum += x[i].toTensor().dim() == 2 ? numel_of(x[i]) : 0;
    return factor * static_cast<double>(x[0].toTensor().size(0)) * sum;
  };
  static constexpr auto convolution = [](Inputs x, size_t first, size_t lists) {
    const auto input = x[first].toTensor(), weight = x[first + 1].toTensor();
    return convolution_flops({input.sizes(), weight.sizes(), x[lists].toIntVector(), x[lists + 1].toIntVector(),
                              x[lists + 2].toIntVector(), x[lists + 3].toBool()});
  };
  static constexpr auto recurrent = [](Inputs x) {  // x [steps, batch, in], weights [gates, in], [gates, hidden]
    const at::Tensor& input = x[0].toTensor();
    return 2 * static_cast<double>(input.size(0) * input.size(1)) * (numel_of(x[1]) + numel_of(x[2]));
  };
  static const std::map<std::string_view, FlopsFormula> formulas = {
      {"aten::mm", [](Inputs x) { return product(x, 0, 1); }},
      {"aten::bmm", [](Inputs x) { return product(x, 0, 1); }},
      {"aten::addmm", [](Inputs x) { return product(x, 1, 2); }},
      {"aten::baddbmm", [](Inputs x) { return product(x, 1, 2); }},
      {"aten::convolution", [](Inputs x) { return convolution(x, 0, 3); }},
      {"aten::convolution_backward", [](Inputs x) { return 2 * convolution(x, 1, 4); }},
      {"aten::mkldnn_rnn_layer", [](Inputs x) { return recurrent(x); }},
      {"aten::mkldnn_rnn_layer_backward", [](Inputs x) { return 2 * recurrent(x); }},
      {"aten::_fft_r2c", [](Inputs x) { return transform(x, 2.5); }},
      {"aten::_fft_c2r", [](Inputs x) { return transform(x, 5); }},
      {"aten::_fft_c2c", [](Inputs x) { return transform(x, 5); }},
      {"aten::_scaled_dot_product_flash_attention_for_cpu", [](Inputs x) { return attention(x, 0, 1, 1); }},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward", [](Inputs x) { return attention(x, 1, 3, 2); }},
      {"aten::_scaled_dot_product_efficient_attention", [](Inputs x) { return attention(x, 0, 1, 1); }},
      {"aten::_scaled_dot_product_efficient_attention_backward", [](Inputs x) { return attention(x, 1, 3, 2); }},
      {"aten::_scaled_dot_product_flash_attention", [](Inputs x) { return attention(x, 0, 1, 1); }},
      {"aten::_scaled_dot_product_flash_attention_backward", [](Inputs x) { return attention(x, 1, 3, 2); }},
      {"headroom::attention", [](Inputs x) { return attention(x, 0, 1, 1); }},
      {"headroom::attention_backward", [](Inputs x) { return attention(x, 0, 3, 2); }},
      {"headroom::token_chain", [](Inputs x) { return chain(x, 2); }},
      {"headroom::token_chain_backward", [](Inputs x) { return chain(x, 4); }},
  };
  const auto formula = formulas.find(name);
  return formula == formulas.end() ? nullptr : formula->second;
}

}  // namespace detail

}  // namespace headroom::inline v0
