#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "headroom/plan/flops.hpp"
#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

inline Tensor padded_2d(const Tensor& x, IntArrayRef padding) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.end()[-1] += padding[0] + padding[1];
  sizes.end()[-2] += padding[2] + padding[3];
  return shaped(x, sizes);
}

inline Tensor im2col(const Tensor& x, IntArrayRef kernel, IntArrayRef dilation, IntArrayRef padding,
                     IntArrayRef stride) {
  int64_t positions = 1;
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t size = x.size(x.dim() - 2 + d);
    positions *=
        (size + 2 * at_dim(padding, d) - at_dim(dilation, d) * (at_dim(kernel, d) - 1) - 1) / at_dim(stride, d) + 1;
  }
  const int64_t columns = x.size(x.dim() - 3) * at_dim(kernel, 0) * at_dim(kernel, 1);
  const Tensor dense = x.contiguous(), y = like(x);  // resized, as LibTorch does
  return x.dim() == 4 ? y.resize_({x.size(0), columns, positions}) : y.resize_({columns, positions});
}
inline Tensor col2im(const Tensor& x, IntArrayRef output, IntArrayRef kernel, IntArrayRef, IntArrayRef, IntArrayRef) {
  const int64_t channels = x.size(x.dim() - 2) / (at_dim(kernel, 0) * at_dim(kernel, 1));
  const Tensor dense = x.contiguous(), y = like(x);
  return x.dim() == 3 ? y.resize_({x.size(0), channels, output[0], output[1]})
                      : y.resize_({channels, output[0], output[1]});
}

inline void register_padding(KernelRegistry& add) {
  add("reflection_pad2d", &padded_2d);
  for (const char* name : {"reflection_pad2d_backward", "replication_pad2d_backward", "replication_pad3d_backward"}) {
    add(name, [](const Tensor&, const Tensor& x, IntArrayRef) { return at::zeros_like(x); });
  }
  add("im2col", &im2col);
  add("col2im", &col2im);
}

}  // namespace headroom::inline v0::detail::meta
