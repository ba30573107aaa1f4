#pragma once

#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "headroom/core/stored.hpp"
#include "headroom/core/view.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/repetition.hpp"

/// Tensors of LibTorch as the tiled kernel's views of plain memory.
namespace headroom::inline v0::detail {

/// An uninitialised tensor of shape `sizes` whose dimensions lie in memory in the order of those of `like`, without
/// gaps: the output of attention over a permuted view can be permuted back and reshaped for free. Not a view, so that
/// what a custom Function returns of it may be changed in place.
inline torch::Tensor empty_in_order_of(const torch::Tensor& like, c10::SymIntArrayRef sizes,
                                       const torch::TensorOptions& options) {
  const c10::SymIntArrayRef of_like = like.sym_strides();
  std::vector<int64_t> inner_first(like.dim());
  std::iota(inner_first.rbegin(), inner_first.rend(), 0);
  std::stable_sort(inner_first.begin(), inner_first.end(),
                   [&](int64_t a, int64_t b) { return of_like[a] < of_like[b]; });
  std::vector<c10::SymInt> strides(like.dim());
  c10::SymInt elements = 1;
  for (const int64_t dim : inner_first) {
    strides[dim] = elements;
    elements = elements * sizes[dim];
  }
  return at::empty_strided_symint(sizes, strides, options);
}
inline torch::Tensor empty_in_order_of(const torch::Tensor& like, at::IntArrayRef sizes,
                                       const torch::TensorOptions& options) {
  return empty_in_order_of(like, c10::SymIntArrayRef(c10::fromIntArrayRefSlow(sizes)), options);
}

/// Whether the dimensions of x lie in memory as those of empty_in_order_of(like, x.sizes(), …) would.
inline bool lies_in_order_of(const torch::Tensor& like, const torch::Tensor& x) {
  std::vector<int64_t> order(like.dim());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater(), [&](int64_t d) { return like.stride(d); });
  int64_t dense = 1;
  for (size_t i = order.size(); i-- > 0; dense *= x.size(order[i])) {
    if (x.size(order[i]) != 1 && x.stride(order[i]) != dense) return false;
  }
  return true;
}

/// Everything that the kernels read and write, [..., H, L, D] with the same batch dimensions; what is not there, or not
/// wanted, is undefined.
struct TiledTensors {
  torch::Tensor q, k, v, output = {}, lse = {};
  torch::Tensor bias = {}, mask = {}, block_mask = {}, slopes = {};
  torch::Tensor grad_output = {}, grad_lse = {}, grad_q = {}, grad_k = {}, grad_v = {}, grad_bias = {},
                grad_slopes = {};

  std::array<torch::Tensor*, 16> all() {
    return {&q,      &k,           &v,        &output, &lse,    &bias,   &mask,      &block_mask,
            &slopes, &grad_output, &grad_lse, &grad_q, &grad_k, &grad_v, &grad_bias, &grad_slopes};
  }
};

/// Named tensors, of which all() points to each, after a change of those that are defined.
template <class Tensors, class F>
Tensors each(Tensors tensors, F&& change) {
  for (torch::Tensor* x : tensors.all()) {
    if (x->defined()) *x = change(*x);
  }
  return tensors;
}

/// Whether one stride steps through the first two dimensions.
inline bool is_mergeable(const torch::Tensor& x) {
  return !x.defined() || x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
}

/// Calls f(4-D parts, first flat batch index) for named tensors with the same batch dimensions, of which `q` is one.
/// Batch dimensions that one stride can't step through are iterated over here; nothing is copied.
template <class Tensors, class F>
void for_each_4d(Tensors x, int64_t batch_index, F&& f) {
  if (x.q.dim() == 3) return f(each(x, [](const torch::Tensor& t) { return t.unsqueeze(0); }), batch_index);
  if (x.q.dim() == 4) return f(x, batch_index);
  if (std::ranges::all_of(x.all(), [](const torch::Tensor* t) { return is_mergeable(*t); })) {
    const auto merged = each(x, [](const torch::Tensor& t) {
      std::vector<int64_t> sizes = t.sizes().vec(), strides = t.strides().vec();
      if (sizes[1] == 1) strides[1] = strides[0];
      sizes[1] *= sizes[0];
      return t.as_strided(at::IntArrayRef(sizes).slice(1), at::IntArrayRef(strides).slice(1));
    });
    return for_each_4d(merged, batch_index, f);
  }
  int64_t inner = 1;
  for (int64_t d = 1; d < x.q.dim() - 3; ++d) inner *= x.q.size(d);
  const int64_t last = x.q.size(0) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    // They need the same: in a dry run the second one stands for all that follow but the last
    const bool stands_for_all = is_dry(x.q) && i == 1 && last > 2;
    const Repetition repetition(stands_for_all ? static_cast<double>(last - 1) : 1);
    if (stands_for_all) i = last - 1;
    for_each_4d(each(x, [&](const torch::Tensor& t) { return t.select(0, i); }), batch_index + i * inner, f);
  }
}

template <class Scalar>
core::TensorView<Scalar> view_of(const torch::Tensor& x) {
  if (!x.defined()) return {};
  // Without data there is nothing to point to, but the tensor is there
  void* const data =
      is_dry(x) ? reinterpret_cast<void*>(alignof(std::max_align_t)) : const_cast<void*>(x.const_data_ptr());
  core::TensorView<Scalar> view{static_cast<Scalar*>(data), {}, {}};
  std::copy_n(x.sizes().begin(), 4, view.shape.begin());
  std::copy_n(x.strides().begin(), 4, view.strides.begin());
  return view;
}

/// Calls f(T()) for the element type of x.
template <class F>
void with_element_type(const torch::Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case torch::kDouble:
      return f(double());
    case torch::kBFloat16:
      return f(Eigen::bfloat16());
    case torch::kHalf:
      return f(Eigen::half());
    default:
      return f(float());
  }
}
inline core::StoredTensor stored(const torch::Tensor& x) {
  core::StoredTensor tensor;
  if (x.defined()) with_element_type(x, [&](auto zero) { tensor = view_of<const decltype(zero)>(x); });
  return tensor;
}

/// The dtype that tensors like x are computed in.
inline torch::ScalarType compute_type(const torch::Tensor& x) {
  return x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
}

}  // namespace headroom::inline v0::detail
