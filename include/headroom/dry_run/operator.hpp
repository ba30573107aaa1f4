#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace headroom::inline v0::detail {

/// What an operator of ours works on, for RECORD_FUNCTION: profilers and traces see it as one of LibTorch's.
inline std::vector<c10::IValue> operator_inputs(at::TensorList tensors) {
  return std::vector<c10::IValue>(tensors.begin(), tensors.end());
}

/// Uninitialised scratch memory of `count` elements for the device of `options`, which traces call workspace.
inline torch::Tensor workspace_tensor(int64_t count, const torch::TensorOptions& options) {
  RECORD_FUNCTION("headroom::workspace", c10::ArrayRef<const c10::IValue>{});
  return torch::empty({count}, options);
}

}  // namespace headroom::inline v0::detail
