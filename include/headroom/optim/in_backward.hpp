#pragma once

#include <torch/types.h>

#include <cstddef>
#include <functional>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/runtime/gradient_hooks.hpp"
#include "headroom/runtime/phase.hpp"

namespace headroom::inline v0::optim {

/// While it lives, backward passes step an optimizer: as soon as the gradient of a parameter is complete the parameter
/// is updated and the gradient freed, so that they are never all there at once. The parameters after backward are those
/// after backward and step(), bit for bit. Learning rates must be set before backward. All parameters are on one
/// device.
///
/// What needs all gradients together cannot be had: clipping to a global norm, and accumulation over several backward
/// passes, each of which is a step here. Gradients that are there already and Prodigy are refused
/// (headroom.optim.in_backward).
///
///     optim::AdamW optimizer(model->parameters());
///     const optim::InBackward in_backward(optimizer);
///     loss(model(x)).backward();  // that is all
///
/// Source: Lv et al. 2023 (LOMO), arXiv:2306.09782.
class InBackward {
 public:
  /// `inspect` sees each parameter, with its gradient, before it is updated; it may throw.
  explicit InBackward(Optimizer& optimizer, std::function<void(const torch::Tensor&)> inspect = {})
      : optimizer_(optimizer), inspect_(std::move(inspect)) {
    require(!optimizer_.needs_all_gradients(), "headroom.optim.in_backward", optimizer_.name(),
            " looks at all gradients before it updates the first parameter, expected an optimizer that needs no more "
            "than a parameter's own, such as AdamW; call step() after the backward pass");
    for (const auto& group : optimizer_.param_groups()) {
      for (const torch::Tensor& parameter : group.params()) {
        require(
            !parameter.grad().defined(), "headroom.optim.in_backward", "a parameter ", parameter.sizes(),
            " has a gradient already, expected none; call zero_grad() first. A step in the backward pass cannot add "
            "to the gradients of another pass");
      }
    }
    for (size_t group = 0; group < optimizer_.param_groups().size(); ++group) {
      for (const torch::Tensor& parameter : optimizer_.param_groups()[group].params()) {
        hooks_.add(parameter, [this, group](const torch::Tensor& complete) { update(group, complete); });
      }
    }
  }
  InBackward(const InBackward&) = delete;
  InBackward& operator=(const InBackward&) = delete;

 private:
  void update(size_t group, const torch::Tensor& parameter) {
    const Phase phase("optimizer");
    if (inspect_) inspect_(parameter);
    optimizer_.update(group, parameter);
    parameter.mutable_grad().reset();
  }

  Optimizer& optimizer_;
  std::function<void(const torch::Tensor&)> inspect_;
  GradientHooks hooks_;
};

}  // namespace headroom::inline v0::optim
