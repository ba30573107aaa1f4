#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "headroom/plan/kernels/registry.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail::meta {

/// Uninitialised statistics of a norm: float for narrow x, on the CPU only where the weight is float.
inline Tensor statistics(const Tensor& x, const OptionalTensor& weight, IntArrayRef sizes) {
  const bool wide =
      !compute_device(x).is_cpu() || (weight.has_value() && weight->defined() && weight->scalar_type() == at::kFloat);
  const bool widened = wide && c10::isReducedFloatingType(x.scalar_type());
  return at::empty(sizes, x.options().dtype(widened ? at::kFloat : x.scalar_type()));
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm(const Tensor& x, IntArrayRef normalized,
                                                            const OptionalTensor& weight, const OptionalTensor&,
                                                            double) {
  std::vector<int64_t> stats = x.sizes().vec();
  std::fill(stats.end() - static_cast<int64_t>(normalized.size()), stats.end(), 1);
  const Tensor dense = x.contiguous(), y = like_contiguous(dense);
  return {y, statistics(x, weight, stats), statistics(x, weight, stats)};
}

/// Partial sums of a thread each, as the CPU kernel makes them.
inline Tensor thread_sums(const Tensor& x, int64_t count) {
  return at::empty({2, at::get_num_threads(), count}, x.options());
}
inline Tensor wanted_like(bool wanted, const OptionalTensor& x) {
  return wanted && x.has_value() && x->defined() ? like_contiguous(*x) : Tensor();
}

inline std::tuple<Tensor, Tensor, Tensor> native_layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                                     IntArrayRef normalized, const Tensor&,
                                                                     const Tensor&, const OptionalTensor& weight,
                                                                     const OptionalTensor& bias,
                                                                     std::array<bool, 3> wanted) {
  const Tensor dense = x.contiguous(), dense_grad = grad.contiguous();
  const Tensor dx = wanted[0] ? like_contiguous(dense) : Tensor();
  const Tensor dw = wanted_like(wanted[1], weight), db = wanted_like(wanted[2], bias);
  const Tensor sums = dw.defined() || db.defined() ? thread_sums(x, c10::multiply_integers(normalized)) : Tensor();
  return {dx, dw, db};
}

inline std::tuple<Tensor, Tensor, Tensor> native_group_norm(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor&, int64_t n, int64_t, int64_t,
                                                            int64_t groups, double) {
  const Tensor dense = x.contiguous();
  const Tensor y = like_contiguous(dense);
  return {y, statistics(x, weight, {n, groups}), statistics(x, weight, {n, groups})};
}

inline std::tuple<Tensor, Tensor, Tensor> native_group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor&,
                                                                     const Tensor&, const OptionalTensor& weight,
                                                                     int64_t n, int64_t c, int64_t, int64_t,
                                                                     std::array<bool, 3> wanted) {
  static_cast<void>(grad);
  const Tensor dx = wanted[0] ? like_contiguous(x) : Tensor();
  const Tensor dw = wanted_like(wanted[1], weight), db = wanted_like(wanted[2], weight);
  const Tensor ds = shaped(x, {n, c}), sums = shaped(x, {n, c});
  return {dx, dw, db};
}

inline std::tuple<Tensor, Tensor, Tensor> native_batch_norm(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor&, const OptionalTensor&,
                                                            const OptionalTensor&, bool training, double, double) {
  const int64_t channels = training ? x.size(1) : 0;
  const Tensor y = like(x), mean = statistics(x, weight, {channels}), inverse = statistics(x, weight, {channels});
  return {y, mean, inverse};
}

inline std::tuple<Tensor, Tensor, Tensor> native_batch_norm_backward(const Tensor&, const Tensor& x,
                                                                     const OptionalTensor& weight,
                                                                     const OptionalTensor&, const OptionalTensor&,
                                                                     const OptionalTensor&, const OptionalTensor&, bool,
                                                                     double, std::array<bool, 3> wanted) {
  const Tensor stat = weight.has_value() && weight->defined() ? *weight : shaped(x, {x.size(1)});
  const Tensor dx = wanted[0] ? like(x) : Tensor();
  const Tensor dw = wanted[1] ? like_contiguous(stat) : Tensor(), db = wanted[2] ? like_contiguous(stat) : Tensor();
  const Tensor projection = wanted[0] ? like(x) : Tensor();
  return {dx, dw, db};
}

inline void register_norms(KernelRegistry& add) {
  add("native_layer_norm", &native_layer_norm);
  add("native_layer_norm_backward", &native_layer_norm_backward);
  add("native_group_norm", &native_group_norm);
  add("native_group_norm_backward", &native_group_norm_backward);
  add("native_batch_norm", &native_batch_norm);
  add("native_batch_norm_backward", &native_batch_norm_backward);
}

}  // namespace headroom::inline v0::detail::meta
