#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/native/TypeProperties.h>

#include <cstdint>
#include <map>
#include <set>
#include <string_view>
#include <vector>

#include "headroom/plan/kernels/product_workspace.hpp"

namespace headroom::inline v0::detail {

/// Bytes that an operator of the CPU needs while it runs, beside its result, and that the meta device does not ask for:
/// copies of operands in the type that an element-wise operator or a sum computes in, and oneDNN's workspace.
inline int64_t cpu_temporary_bytes(std::string_view name, c10::ArrayRef<const c10::IValue> inputs) {
  if (name == "aten::sum" && inputs.size() == 4 && inputs[0].isTensor()) {  // with dimensions
    const at::Tensor& x = inputs[0].toTensor();
    return c10::isIntegralType(x.scalar_type(), true) && x.scalar_type() != at::kLong ? x.numel() * 8 : 0;
  }
  if (name == "aten::mean" && inputs.size() == 4) {  // with dimensions: of narrow types in float
    const at::Tensor& x = inputs[0].toTensor();
    if (!c10::isReducedFloatingType(x.scalar_type()) || x.numel() == 0) return 0;
    const auto dims = inputs[1].toOptional<std::vector<int64_t>>().value_or(std::vector<int64_t>());
    int64_t results = dims.empty() ? 1 : x.numel();
    for (const int64_t d : dims) results /= x.size(d);
    return (x.numel() + results) * 4;
  }
  static const std::map<std::string_view, size_t> products = {
      {"aten::mm", 0}, {"aten::bmm", 0}, {"aten::addmm", 1}, {"aten::baddbmm", 1}};  // place of the left factor
  if (const auto product = products.find(name); product != products.end()) {
    const at::Tensor &left = inputs[product->second].toTensor(), &right = inputs[product->second + 1].toTensor();
    // Under autocast it is called once more, with what was cast
    const bool narrow = c10::isReducedFloatingType(left.scalar_type()) && !at::autocast::is_autocast_enabled(at::kCPU);
    return narrow ? ProductWorkspace::bytes(name, left, right) : 0;
  }
  static const std::set<std::string_view> promoting = {
      "aten::add", "aten::add_", "aten::sub", "aten::sub_",    "aten::mul",     "aten::mul_",
      "aten::div", "aten::div_", "aten::pow", "aten::eq",      "aten::ne",      "aten::lt",
      "aten::le",  "aten::gt",   "aten::ge",  "aten::maximum", "aten::minimum", "aten::atan2"};
  if (!promoting.contains(name) || inputs.size() < 2 || !inputs[0].isTensor() || !inputs[1].isTensor()) return 0;
  const at::Tensor &a = inputs[0].toTensor(), &b = inputs[1].toTensor();
  if (!a.defined() || !b.defined()) return 0;
  const c10::ScalarType type = at::native::result_type(a, b);
  int64_t bytes = 0;
  for (const at::Tensor* x : {&a, &b}) {
    if (x->scalar_type() != type) bytes += x->numel() * static_cast<int64_t>(c10::elementSize(type));
  }
  if (name.ends_with('_') && a.scalar_type() != type) bytes *= 2;  // the result, before it is cast back
  return bytes;
}

}  // namespace headroom::inline v0::detail
