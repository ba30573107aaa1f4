#pragma once

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/types.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// Functions that backward passes call while this lives: each as soon as the gradient of its parameter is complete. A
/// parameter has one.
class GradientHooks {
 public:
  using Function = std::function<void(const torch::Tensor& parameter)>;

  GradientHooks() = default;
  ~GradientHooks() {
    for (const torch::Tensor& parameter : parameters_) {
      torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
    }
  }
  GradientHooks(const GradientHooks&) = delete;
  GradientHooks& operator=(const GradientHooks&) = delete;

  void add(const torch::Tensor& parameter, Function function) {
    auto hook = std::make_unique<Hook>(std::move(function));
    parameters_.push_back(parameter);
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, std::move(hook));
  }

 private:
  struct Hook final : torch::autograd::PostAccumulateGradHook {
    Function function;
    explicit Hook(Function f) : function(std::move(f)) {}
    void operator()(const torch::autograd::Variable& parameter) override { function(parameter); }
  };

  std::vector<torch::Tensor> parameters_;
};

}  // namespace headroom::inline v0
