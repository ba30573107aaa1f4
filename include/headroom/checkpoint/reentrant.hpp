#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/piece_gradients.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

namespace detail {

using torch::autograd::variable_list;

/// Throws headroom.checkpoint.undefined.
inline void check_defined(const variable_list& tensors, const char* what) {
  for (const at::Tensor& x : tensors) {
    require(x.defined(), "headroom.checkpoint.undefined", what,
            " of a reentrant or tiled checkpoint is an undefined tensor; let forward capture what may be missing, and "
            "return what is there");
  }
}

/// What one node of the graph computes, and how it differentiates that in its own backward.
class ReentrantWork {
 public:
  virtual ~ReentrantWork() = default;
  /// Without a graph.
  virtual variable_list run(const variable_list& inputs) const = 0;
  /// Gradients of the inputs, leaves that want them or do not, given those of what run() gives. Computes that again.
  virtual variable_list differentiate(const variable_list& inputs, const variable_list& grads,
                                      PieceGradients& pieces) const = 0;
};

/// What such a node holds.
struct ReentrantCall : torch::CustomClassHolder {
  ReentrantCall(std::shared_ptr<const ReentrantWork> w, at::TensorList p) : work(std::move(w)), parameters(p) {}
  std::shared_ptr<const ReentrantWork> work;
  Parameters parameters;
  AmbientState state;
  std::vector<StoredInput<at::Tensor>> inputs;
};

struct ReentrantFunction : torch::autograd::Function<ReentrantFunction> {
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs, at::TensorList parameters,
                               const std::shared_ptr<const ReentrantWork>& work) {
    const auto call = c10::make_intrusive<ReentrantCall>(work, parameters);
    const auto versions = [&] {
      std::vector<std::uint32_t> all;
      for (const at::Tensor& x : inputs) all.push_back(version_of(x));
      return all;
    };
    const auto before = versions();
    variable_list outputs = work->run(inputs.vec());
    check_defined(outputs, "a result");
    // inputs, views of them and captured tensors are results like any other
    for (at::Tensor& x : outputs) x = x.detach();
    require(versions() == before, "headroom.checkpoint.modified",
            "forward changed an input in place, so that backward would compute with other values; let it work on a "
            "clone");
    call->state.random.forget_unused();
    for (const at::Tensor& x : inputs) call->inputs.emplace_back(x);
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    const RecomputationScope scope("a reentrant or tiled checkpoint");
    ctx->get_saved_variables();  // there are none, but this says so when the graph was freed
    const auto holder = ctx->saved_data["call"].toCapsule();
    auto& call = static_cast<ReentrantCall&>(*holder);
    PieceGradients pieces(call.parameters.checked());
    variable_list inputs, result(call.inputs.size());
    for (std::size_t i = 0; i < call.inputs.size(); ++i) {
      inputs.push_back(call.inputs[i].restore().set_requires_grad(ctx->needs_input_grad(i)));
    }
    if (std::any_of(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined(); })) {
      const AmbientStateGuard state(call.state);
      result = call.work->differentiate(inputs, grads, pieces);
    }
    if (!torch::autograd::get_current_graph_task_keep_graph()) call.inputs.clear();
    result.insert(result.end(), pieces.sums().begin(), pieces.sums().end());
    result.emplace_back();  // the work
    return result;
  }
};

/// The work on the inputs, as a node of the graph where one is recorded.
inline variable_list reentrant_call(const std::shared_ptr<const ReentrantWork>& work, const variable_list& inputs,
                                    const std::vector<at::Tensor>& parameters) {
  check_defined(inputs, "an input");
  const auto wants = [](const at::Tensor& x) { return x.requires_grad(); };
  const bool records = at::GradMode::is_enabled() && (std::any_of(inputs.begin(), inputs.end(), wants) ||
                                                      std::any_of(parameters.begin(), parameters.end(), wants));
  return records ? ReentrantFunction::apply(at::TensorList(inputs), at::TensorList(parameters), work)
                 : work->run(inputs);
}

/// A result of forward as a list, and back.
template <class Result>
struct OutputList;
template <>
struct OutputList<at::Tensor> {
  static variable_list from(at::Tensor x) { return {std::move(x)}; }
  static at::Tensor to(variable_list x) { return std::move(x[0]); }
};
template <>
struct OutputList<std::vector<at::Tensor>> {
  static variable_list from(std::vector<at::Tensor> x) { return x; }
  static std::vector<at::Tensor> to(variable_list x) { return x; }
};
template <std::same_as<at::Tensor>... Tensors>
struct OutputList<std::tuple<Tensors...>> {
  static variable_list from(const std::tuple<Tensors...>& x) {
    return std::apply([](const auto&... all) { return variable_list{all...}; }, x);
  }
  static std::tuple<Tensors...> to(const variable_list& x) {
    return [&]<std::size_t... I>(std::index_sequence<I...>) { return std::tuple<Tensors...>{x[I]...}; }
    (std::index_sequence_for<Tensors...>());
  }
};

/// forward(inputs...), differentiated in one piece.
template <class F, std::size_t Inputs, class Output>
class WholeWork final : public ReentrantWork {
 public:
  explicit WholeWork(F forward) : forward_(std::move(forward)) {}

  variable_list run(const variable_list& inputs) const override {
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
      return Output::from(std::invoke(forward_, inputs[I]...));
    }
    (std::make_index_sequence<Inputs>());
  }
  variable_list differentiate(const variable_list& inputs, const variable_list& grads,
                              PieceGradients& pieces) const override {
    return pieces.differentiate(run(inputs), inputs, grads);
  }

 private:
  mutable F forward_;
};

}  // namespace detail

/// Calls `forward(inputs...)` and returns what it returns, a tensor, a vector or a tuple of tensors, as checkpoint()
/// does: only the inputs are held, the gradients are those of the plain call, bit for bit. But the call is one node of
/// the graph, which runs forward again and differentiates it inside of its own backward (torch.utils.checkpoint with
/// use_reentrant=True).
///
/// Nothing of forward is matched between both runs, and no saved-tensor hooks are needed, so that it works under any
/// autograd engine. In return every leaf that forward uses and that needs a gradient is an input or among `parameters`
/// (headroom.checkpoint.captured); their gradients arrive once, as do their hooks, when all of forward is
/// differentiated. First derivatives only (headroom.checkpoint.second_derivative). Inputs and
/// results are defined (headroom.checkpoint.undefined), inputs need no gradient; neither they nor the parameters may
/// change before backward (headroom.checkpoint.modified).
///
/// Memory: as checkpoint(); the gradients of all parameters and inputs are there at once. Time: one more forward.
/// Source: Chen et al. 2016, arXiv:1604.06174.
template <class F, std::convertible_to<at::Tensor>... Inputs>
auto reentrant_checkpoint(const std::vector<at::Tensor>& parameters, F&& forward, const Inputs&... inputs) {
  using Output = detail::OutputList<std::decay_t<std::invoke_result_t<F&, const Inputs&...>>>;
  using Work = detail::WholeWork<std::decay_t<F>, sizeof...(Inputs), Output>;
  const auto work = std::make_shared<const Work>(std::forward<F>(forward));
  return Output::to(detail::reentrant_call(work, {inputs...}, parameters));
}

}  // namespace headroom::inline v0
