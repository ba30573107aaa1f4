#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

inline std::vector<int64_t> reduced_sizes(const Tensor& x, at::OptionalIntArrayRef dims, bool keepdim) {
  std::vector<bool> gone(static_cast<size_t>(x.dim()), !dims.has_value() || dims->empty());
  if (dims.has_value()) {
    for (const int64_t d : *dims) gone[static_cast<size_t>(d < 0 ? d + x.dim() : d)] = true;
  }
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (!gone[static_cast<size_t>(d)]) sizes.push_back(x.size(d));
    if (gone[static_cast<size_t>(d)] && keepdim) sizes.push_back(1);
  }
  return sizes;
}
inline Tensor reduced(const Tensor& x, at::OptionalIntArrayRef dims, bool keepdim) {
  return at::empty(reduced_sizes(x, dims, keepdim), x.options().dtype(c10::toRealValueType(x.scalar_type())));
}

inline void register_reductions(KernelRegistry& add) {
  add("var.correction", [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&,
                           bool keepdim) { return reduced(x, dims, keepdim); });
  add("std.correction", [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&,
                           bool keepdim) { return reduced(x, dims, keepdim); });
  for (const char* name : {"var_mean.correction", "std_mean.correction"}) {
    add(name, [](const Tensor& x, at::OptionalIntArrayRef dims, const std::optional<at::Scalar>&, bool keepdim) {
      return std::tuple(reduced(x, dims, keepdim), reduced(x, dims, keepdim));
    });
  }
  for (const char* name : {"max", "min", "median"}) {
    add(name, [](const Tensor& x) { return shaped(x, {}); });
  }
  add("prod", [](const Tensor& x, std::optional<at::ScalarType> type) {
    return at::empty({}, x.options().dtype(type.value_or(x.scalar_type())));
  });
  add("dot", [](const Tensor& x, const Tensor&) { return shaped(x, {}); });
}

}  // namespace headroom::inline v0::detail::meta
