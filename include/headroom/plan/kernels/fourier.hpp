#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

/// How a transform of some dimensions goes through a tensor, as with MKL: the batch dimensions first, in the order of
/// their strides, and taken as one.
class TransformOrder {
 public:
  TransformOrder(const Tensor& x, IntArrayRef dims) : dims_(dims.vec()), order_(static_cast<size_t>(x.dim())) {
    for (int64_t& d : dims_) d = d < 0 ? d + x.dim() : d;
    std::iota(order_.begin(), order_.end(), 0);
    const auto is_batch = [&](int64_t d) { return std::find(dims_.begin(), dims_.end(), d) == dims_.end(); };
    const auto batch_end = std::stable_partition(order_.begin(), order_.end(), is_batch);
    std::stable_sort(order_.begin(), batch_end, [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
    std::copy(dims_.begin(), dims_.end(), batch_end);
  }

  /// A copy where strides do not allow to take the batch dimensions as one.
  Tensor rows_of(const Tensor& x) const {
    std::vector<int64_t> sizes{-1};
    for (const int64_t d : dims_) sizes.push_back(x.size(d));
    return x.permute(order_).reshape(sizes);
  }
  /// A result of these sizes, which lies in memory in this order.
  Tensor result(IntArrayRef sizes, const at::TensorOptions& options) const {
    std::vector<int64_t> ordered, place(order_.size());
    for (size_t i = 0; i < order_.size(); ++i) {
      ordered.push_back(sizes[static_cast<size_t>(order_[i])]);
      place[static_cast<size_t>(order_[i])] = static_cast<int64_t>(i);
    }
    return at::empty(ordered, options).permute(place);
  }
  int64_t last() const { return dims_.back(); }

 private:
  std::vector<int64_t> dims_, order_;
};

inline Tensor fft_c2c(const Tensor& x, IntArrayRef dims, int64_t, bool) {
  if (dims.empty()) return x.clone();
  const TransformOrder order(x, dims);
  const Tensor out = order.result(x.sizes(), x.options());
  const Tensor rows = order.rows_of(x);
  return out;
}
inline Tensor fft_r2c(const Tensor& x, IntArrayRef dims, int64_t, bool onesided) {
  const TransformOrder order(x, dims);
  std::vector<int64_t> sizes = x.sizes().vec();
  if (onesided) sizes[static_cast<size_t>(order.last())] = x.size(order.last()) / 2 + 1;
  const Tensor out = order.result(sizes, x.options().dtype(c10::toComplexType(x.scalar_type())));
  const Tensor rows = order.rows_of(x);
  return out;
}
inline Tensor fft_c2r(const Tensor& x, IntArrayRef dims, int64_t normalization, int64_t last_size) {
  const Tensor input = dims.size() > 1 ? fft_c2c(x, dims.slice(0, dims.size() - 1), normalization, false) : x;
  const TransformOrder order(input, dims.slice(dims.size() - 1));
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[static_cast<size_t>(order.last())] = last_size;
  const Tensor out = order.result(sizes, x.options().dtype(c10::toRealValueType(x.scalar_type())));
  const Tensor rows = order.rows_of(input);
  return out;
}

inline void register_transforms(KernelRegistry& add) {
  add("_fft_c2c", &fft_c2c);
  add("_fft_r2c", &fft_r2c);
  add("_fft_c2r", &fft_c2r);
}

}  // namespace headroom::inline v0::detail::meta
