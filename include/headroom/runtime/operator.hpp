#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <string_view>
#include <utility>
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

/// Stands between operators of ours and their callers on this thread while it lives, to keep results and hand them out
/// again. The innermost one counts.
class OperatorResults {
 public:
  using Results = std::vector<at::Tensor>;

  OperatorResults() : outer_(std::exchange(current_, this)) {}
  virtual ~OperatorResults() { current_ = outer_; }
  OperatorResults(const OperatorResults&) = delete;
  OperatorResults& operator=(const OperatorResults&) = delete;

  /// What compute() gives for the operator `name`, below autograd; or what it gave before.
  static Results of(std::string_view name, const std::function<Results()>& compute) {
    return current_ != nullptr ? current_->call(name, compute) : compute();
  }

 protected:
  virtual Results call(std::string_view name, const std::function<Results()>& compute) = 0;

 private:
  static inline thread_local OperatorResults* current_ = nullptr;

  OperatorResults* outer_;
};

}  // namespace headroom::inline v0::detail
