#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "headroom/core/error.hpp"
#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

/// Of tensors without data only those are known to be equal that are the same.
inline bool equal(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

/// What reading a value gives in this thread's dry run; none: it fails.
inline thread_local std::optional<double> value_read;
inline thread_local int64_t values_read = 0;

inline at::Scalar read_value(const Tensor& x) {
  require(value_read.has_value(), "headroom.memory.plan.values",
          "the step reads a value, as .item() and control flow that depends on data do: a ", x.scalar_type(),
          " tensor ", x.sizes(),
          " has no data while it is planned; take the reading out of the planned step, or say in "
          "PlanOptions::value what every reading shall give");
  ++values_read;
  return c10::isIntegralType(x.scalar_type(), true) ? at::Scalar(static_cast<int64_t>(*value_read))
                                                    : at::Scalar(*value_read);
}

inline void register_values(KernelRegistry& add) {
  add("_local_scalar_dense", &read_value);
  add("equal", &equal);
}

}  // namespace headroom::inline v0::detail::meta
