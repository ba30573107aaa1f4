#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

inline Tensor abs(const Tensor& x) {
  return at::empty_like(x, x.options().dtype(c10::toRealValueType(x.scalar_type())));
}
inline Tensor complex(const Tensor& a, const Tensor& b) { return broadcast(a, b, c10::toComplexType(a.scalar_type())); }
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  const auto type = at::result_type(a, b);
  const Tensor left = a.scalar_type() == type ? a : a.to(type), right = b.scalar_type() == type ? b : b.to(type);
  return at::empty(at::infer_size(condition.sizes(), at::infer_size(a.sizes(), b.sizes())),
                   (a.dim() > 0 ? a : condition).options().dtype(type));
}

inline Tensor& resized(Tensor& out, IntArrayRef sizes) {
  if (out.sizes() != sizes) out.resize_(sizes);
  return out;
}

inline void register_elementwise(KernelRegistry& add) {
  for (const char* name : {"relu", "hardswish", "isnan"}) {
    add(
        name, name == std::string("isnan") ? [](const Tensor& x) { return at::empty_like(x, at::kBool); }
                                           : [](const Tensor& x) { return like(x); });
  }
  add("abs", &abs);
  add("angle", &abs);
  for (const char* name : {"logical_and.out", "logical_or.out", "logical_xor.out"}) {
    add(name, [](const Tensor& a, const Tensor& b, Tensor& out) -> Tensor& {
      return resized(out, at::infer_size(a.sizes(), b.sizes()));
    });
  }
  add("nan_to_num.out",
      [](const Tensor& x, std::optional<double>, std::optional<double>, std::optional<double>, Tensor& out) -> Tensor& {
        return resized(out, x.sizes());
      });
  add("logical_not.out", [](const Tensor& x, Tensor& out) -> Tensor& { return resized(out, x.sizes()); });
  add("complex", &complex);
  add("polar", &complex);
  add("where.self", &where);
  add("hardtanh", [](const Tensor& x, const at::Scalar&, const at::Scalar&) { return like(x); });
  add("hardtanh_backward",
      [](const Tensor&, const Tensor& x, const at::Scalar&, const at::Scalar&) { return like(x); });
  add("hardswish_backward", [](const Tensor&, const Tensor& x) { return like(x); });
  add("_prelu_kernel", [](const Tensor& x, const Tensor&) { return like(x); });
  add("_prelu_kernel_backward",
      [](const Tensor&, const Tensor& x, const Tensor&) { return std::tuple(like(x), like(x)); });
  add("log_sigmoid_forward", [](const Tensor& x) { return std::tuple(like(x), like(x)); });
  add("log_sigmoid_backward", [](const Tensor& grad, const Tensor&, const Tensor&) { return like(grad); });
  add("glu_backward", [](const Tensor&, const Tensor& x, int64_t) { return like(x); });
  add("native_dropout",
      [](const Tensor& x, double, std::optional<bool>) { return std::tuple(like(x), at::empty_like(x, at::kBool)); });
  add("native_dropout_backward", [](const Tensor& grad, const Tensor&, double) { return like(grad); });
}

}  // namespace headroom::inline v0::detail::meta
