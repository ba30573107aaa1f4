#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

inline Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index) {
  std::vector<int64_t> sizes = x.sizes().vec();
  if (!sizes.empty()) sizes[static_cast<size_t>(dim < 0 ? dim + x.dim() : dim)] = index.numel();
  return shaped(x, sizes);
}
inline Tensor embedding_dense_backward(const Tensor& grad, const Tensor& indices, int64_t count, int64_t, bool) {
  const Tensor dense = indices.contiguous();
  const Tensor rows = grad.reshape({indices.numel(), grad.size(-1)});
  return at::zeros({count, grad.size(-1)}, grad.options());
}
inline Tensor unfold_backward(const Tensor& grad, IntArrayRef sizes, int64_t dim, int64_t size, int64_t step) {
  const Tensor sum = at::zeros(sizes, grad.options());
  const int64_t reach = (grad.size(dim < 0 ? dim + grad.dim() - 1 : dim) - 1) * step + size;
  const Tensor positions = at::empty({reach}, grad.options().dtype(at::kLong));
  return sum;
}

inline void register_indexing(KernelRegistry& add) {
  add("index_select", &index_select);
  add("bucketize.Tensor", [](const Tensor& x, const Tensor&, bool out_int32, bool) {
    return at::empty(x.sizes(), x.options().dtype(out_int32 ? at::kInt : at::kLong));
  });
  add("embedding_dense_backward", &embedding_dense_backward);
  add("unfold_backward", &unfold_backward);
  add("repeat", [](const Tensor& x, IntArrayRef times) {
    std::vector<int64_t> sizes(times.begin(), times.end());
    for (int64_t d = 0; d < x.dim(); ++d) sizes[sizes.size() - static_cast<size_t>(x.dim() - d)] *= x.size(d);
    return shaped(x, sizes);
  });
  add("flip", [](const Tensor& x, IntArrayRef) { return like_contiguous(x); });
  add("roll", [](const Tensor& x, IntArrayRef, IntArrayRef) { return like_contiguous(x); });
}

}  // namespace headroom::inline v0::detail::meta
