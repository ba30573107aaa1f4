#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

/// The loss of an element-wise comparison: as large as the inputs, or a mean or sum of that.
inline Tensor loss(const Tensor& a, const Tensor& b, int64_t reduction) {
  const Tensor elements = broadcast(a, b, a.scalar_type());
  return reduction == at::Reduction::None ? elements : elements.sum();
}

inline void register_losses(KernelRegistry& add) {
  add("mse_loss_backward", [](const Tensor&, const Tensor& x, const Tensor&, int64_t) { return like(x); });
  add("smooth_l1_loss_backward",
      [](const Tensor&, const Tensor& x, const Tensor&, int64_t, double) { return like(x); });
  add("huber_loss", [](const Tensor& a, const Tensor& b, int64_t reduction, double) { return loss(a, b, reduction); });
  add("huber_loss_backward", [](const Tensor&, const Tensor& x, const Tensor&, int64_t, double) { return like(x); });
  add("binary_cross_entropy", [](const Tensor& a, const Tensor& b, const OptionalTensor&, int64_t reduction) {
    // The reduced loss stays in the memory of the elements
    const Tensor elements = broadcast(a, b, a.scalar_type());
    if (reduction == at::Reduction::Mean) elements.mean(), elements.resize_({});
    if (reduction == at::Reduction::Sum) elements.sum(), elements.resize_({});
    return elements;
  });
  add("binary_cross_entropy_backward",
      [](const Tensor&, const Tensor& x, const Tensor&, const OptionalTensor&, int64_t) { return like(x); });
}

}  // namespace headroom::inline v0::detail::meta
