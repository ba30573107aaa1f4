#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/native/TypeProperties.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "headroom/plan/kernels/product_workspace.hpp"

namespace headroom::inline v0::detail {

/// Bytes that an operator of the CPU needs while it runs, beside its result, and that the meta device does not ask for.
using TemporaryBytes = int64_t (*)(std::string_view name, c10::ArrayRef<const c10::IValue> inputs);

/// A sum over dimensions widens narrow integers first.
inline int64_t sum_temporaries(std::string_view, c10::ArrayRef<const c10::IValue> inputs) {
  if (inputs.size() != 4 || !inputs[0].isTensor()) return 0;
  const at::Tensor& x = inputs[0].toTensor();
  return c10::isIntegralType(x.scalar_type(), true) && x.scalar_type() != at::kLong ? x.numel() * 8 : 0;
}

/// A mean over dimensions computes narrow types in float.
inline int64_t mean_temporaries(std::string_view, c10::ArrayRef<const c10::IValue> inputs) {
  if (inputs.size() != 4) return 0;
  const at::Tensor& x = inputs[0].toTensor();
  if (!c10::isReducedFloatingType(x.scalar_type()) || x.numel() == 0) return 0;
  const auto dims = inputs[1].toOptional<std::vector<int64_t>>().value_or(std::vector<int64_t>());
  int64_t results = dims.empty() ? 1 : x.numel();
  for (const int64_t d : dims) results /= x.size(d);
  return (x.numel() + results) * 4;
}

/// oneDNN's workspace. `Left`: place of the left factor, which the right one follows.
template <size_t Left>
int64_t product_temporaries(std::string_view name, c10::ArrayRef<const c10::IValue> inputs) {
  const at::Tensor &left = inputs[Left].toTensor(), &right = inputs[Left + 1].toTensor();
  // Under autocast it is called once more, with what was cast
  const bool narrow = c10::isReducedFloatingType(left.scalar_type()) && !at::autocast::is_autocast_enabled(at::kCPU);
  return narrow ? ProductWorkspace::bytes(name, left, right) : 0;
}

/// An element-wise operator copies operands into the type that it computes in.
inline int64_t promotion_temporaries(std::string_view name, c10::ArrayRef<const c10::IValue> inputs) {
  if (inputs.size() < 2 || !inputs[0].isTensor() || !inputs[1].isTensor()) return 0;
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

/// The formula of an operator, nullptr where it has none.
inline TemporaryBytes cpu_temporaries(std::string_view name) {
  static const std::map<std::string_view, TemporaryBytes> formulas = [] {
    std::map<std::string_view, TemporaryBytes> all = {
        {"aten::sum", &sum_temporaries},          {"aten::mean", &mean_temporaries},
        {"aten::mm", &product_temporaries<0>},    {"aten::bmm", &product_temporaries<0>},
        {"aten::addmm", &product_temporaries<1>}, {"aten::baddbmm", &product_temporaries<1>}};
    for (const char* promoting :
         {"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::mul", "aten::mul_", "aten::div", "aten::div_",
          "aten::pow", "aten::eq", "aten::ne", "aten::lt", "aten::le", "aten::gt", "aten::ge", "aten::maximum",
          "aten::minimum", "aten::atan2"}) {
      all[promoting] = &promotion_temporaries;
    }
    return all;
  }();
  const auto formula = formulas.find(name);
  return formula == formulas.end() ? nullptr : formula->second;
}

}  // namespace headroom::inline v0::detail
