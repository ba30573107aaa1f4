#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail::meta {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each kernel makes the tensors that the operator's CPU kernel makes, in its order, and computes nothing.

inline Tensor like(const Tensor& x) { return at::empty_like(x); }
inline Tensor like_contiguous(const Tensor& x) { return at::empty_like(x, {}, at::MemoryFormat::Contiguous); }
inline Tensor shaped(const Tensor& x, IntArrayRef sizes) { return at::empty(sizes, x.options()); }

inline Tensor broadcast(const Tensor& a, const Tensor& b, c10::ScalarType type) {
  return at::empty(at::infer_size(a.sizes(), b.sizes()), a.options().dtype(type));
}

/// Registers kernels of the meta device while it lives, each where LibTorch has none of its own.
class KernelRegistry {
 public:
  /// `name`: an operator of ATen, "norm" or "norm.overload".
  template <class F>
  void operator()(const char* name, F&& kernel) {
    const std::string full = std::string("aten::") + name;
    const size_t dot = full.find('.');
    const auto handle = c10::Dispatcher::singleton().findSchema(
        {full.substr(0, dot), dot == std::string::npos ? "" : full.substr(dot + 1)});
    if (handle.has_value() && !handle->hasKernelForDispatchKey(c10::DispatchKey::Meta)) {
      library_.impl(name, std::forward<F>(kernel));
    }
  }

 private:
  torch::Library library_{torch::Library::IMPL, "aten", c10::DispatchKey::Meta, __FILE__, __LINE__};
};

}  // namespace headroom::inline v0::detail::meta
