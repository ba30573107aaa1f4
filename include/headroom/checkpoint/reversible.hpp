#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/piece_gradients.hpp"

namespace headroom::inline v0 {

/// A pair of branches that two streams of equal shape go through: y1 = x1 + first(x2), y2 = x2 + second(y1). The inputs
/// follow from the outputs: x2 = y2 - second(y1), x1 = y1 - first(x2).
struct ReversibleLayer {
  /// A function of tokens that keeps their shape.
  struct Branch {
    std::function<at::Tensor(const at::Tensor&)> forward;
    std::vector<at::Tensor> parameters;  ///< all that forward uses and that need gradients
  };
  Branch first, second;
};

namespace detail {

struct ReversibleCall : torch::CustomClassHolder {
  struct Half {
    ReversibleLayer::Branch branch;
    Parameters parameters;
    AmbientState state;
  };
  std::vector<Half> halves;
};

struct ReversibleFunction : torch::autograd::Function<ReversibleFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x1,
                                                const at::Tensor& x2, at::TensorList,
                                                const std::vector<ReversibleLayer>& layers) {
    auto call = c10::make_intrusive<ReversibleCall>();
    at::Tensor y[2] = {x1.clone(), x2.clone()};
    for (const ReversibleLayer& layer : layers) {
      for (const auto* branch : {&layer.first, &layer.second}) {
        const std::size_t changed = call->halves.size() % 2;
        auto& half = call->halves.emplace_back(*branch, Parameters(branch->parameters));
        y[changed].add_(branch->forward(y[1 - changed]));
        half.state.random.forget_unused();
      }
    }
    ctx->save_for_backward({y[0], y[1]});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return {y[0], y[1]};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const RecomputationScope scope("a reversible stack");
    const auto holder = ctx->saved_data["call"].toCapsule();
    const auto& halves = static_cast<const ReversibleCall&>(*holder).halves;
    auto y = ctx->get_saved_variables();
    at::Tensor grad[2] = {grads[0].clone(), grads[1].clone()};
    std::vector<std::vector<at::Tensor>> sums(halves.size());
    for (std::size_t i = halves.size(); i-- > 0;) {
      const auto& [branch, parameters, state] = halves[i];
      const std::size_t changed = i % 2, read = 1 - changed;
      PieceGradients pieces(parameters.checked());
      const AmbientStateGuard replay(state);
      const at::Tensor input = y[read].detach().requires_grad_();
      torch::autograd::variable_list change{branch.forward(input)};
      y[changed] = y[changed].detach() - change[0].detach();
      const auto of_input = pieces.differentiate(std::move(change), {input}, {grad[changed]});
      if (of_input[0].defined()) grad[read].add_(of_input[0]);
      sums[i] = pieces.sums();
    }
    torch::autograd::variable_list result{grad[0], grad[1]};
    for (const auto& of_half : sums) result.insert(result.end(), of_half.begin(), of_half.end());
    result.emplace_back();  // the layers
    return result;
  }
};

}  // namespace detail

/// Sends two streams through reversible layers and returns what comes out. Only that is stored: backward computes the
/// inputs of each layer from its outputs, the last layer first, so that memory does not depend on the depth.
///
/// Inputs that are computed back carry rounding errors: gradients are equal up to rounding, which grows with the depth.
/// Random numbers and autocast are replayed. Every leaf that a branch uses and that needs a gradient is among its
/// parameters (headroom.checkpoint.captured); first derivatives only (headroom.checkpoint.second_derivative).
/// Memory: two streams; in backward two more, their gradients, and one branch. Time: one more forward.
/// Source: Gomez et al. 2017, arXiv:1707.04585; of transformers: Kitaev et al. 2020, arXiv:2001.04451.
inline std::pair<at::Tensor, at::Tensor> run_reversible(const std::vector<ReversibleLayer>& layers,
                                                        const at::Tensor& x1, const at::Tensor& x2) {
  std::vector<at::Tensor> parameters;
  for (const ReversibleLayer& layer : layers) {
    for (const auto* branch : {&layer.first, &layer.second}) {
      parameters.insert(parameters.end(), branch->parameters.begin(), branch->parameters.end());
    }
  }
  const auto y = detail::ReversibleFunction::apply(x1, x2, at::TensorList(parameters), layers);
  return {y[0], y[1]};
}

}  // namespace headroom::inline v0
