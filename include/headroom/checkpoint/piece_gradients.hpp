#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "headroom/checkpoint/result_cache.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// While it lives, a backward of ours runs forward again, outside of whatever scopes backward itself runs in.
class RecomputationScope {
 public:
  /// `what` is differentiated: "a reversible stack". Throws headroom.checkpoint.second_derivative.
  explicit RecomputationScope(const char* what) {
    require(!at::GradMode::is_enabled(), "headroom.checkpoint.second_derivative", what,
            " was differentiated with create_graph=true, but its gradients have no graph behind them; use "
            "checkpoint()");
    if (SavedTensorHooks::current() != nullptr) plain_.emplace(&keep);
  }

 private:
  Phase phase_{"recomputation"};
  std::optional<SavedTensorHooks> plain_;
  ResultCacheScope none_{nullptr, ResultCacheScope::Mode::store};
};

/// Parameters that a backward of ours will use, as they are now.
class Parameters {
 public:
  explicit Parameters(at::TensorList parameters) : tensors_(parameters.vec()) {
    for (const at::Tensor& p : tensors_) versions_.push_back(version_of(p));
  }
  /// Throws headroom.checkpoint.modified.
  const std::vector<at::Tensor>& checked() const {
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      require(version_of(tensors_[i]) == versions_[i], "headroom.checkpoint.modified", "a parameter of shape ",
              tensors_[i].sizes(), " was modified between forward and backward; step the optimizer after backward");
    }
    return tensors_;
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<std::uint32_t> versions_;
};

/// The root of a piece's graph: brings the gradients of its outputs in and lets go of them, where the caller of
/// torch::autograd::grad would hold outputs and gradients until all is through.
struct GradientSource : torch::autograd::Function<GradientSource> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList outputs, const c10::IValue& grads) {
    ctx->saved_data["grads"] = grads;
    return at::empty({}, outputs[0].options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list&) {
    auto grads = ctx->saved_data["grads"].toTensorVector();
    ctx->saved_data.clear();
    grads.emplace_back();  // of the gradients
    return grads;
  }
};

/// Gradients of a network that a node of the graph differentiates piece by piece inside its own backward. Those of the
/// parameters are added up here, to be returned once: hooks of a parameter see the sum, as they would without pieces.
class PieceGradients {
 public:
  explicit PieceGradients(std::vector<at::Tensor> parameters)
      : parameters_(std::move(parameters)), sums_(parameters_.size()) {}

  /// Gradients of `inputs`, leaves made for this piece, given those of `outputs`; undefined where nothing depends on
  /// one, or none is wanted. Adds those of the parameters. Neither outputs nor their gradients live longer than needed.
  /// Throws headroom.checkpoint.captured when the piece depends on a leaf that is neither.
  torch::autograd::variable_list differentiate(torch::autograd::variable_list outputs,
                                               const torch::autograd::variable_list& inputs,
                                               torch::autograd::variable_list grad_outputs) {
    torch::autograd::variable_list roots, grad_roots, leaves;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!grad_outputs[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(std::move(outputs[i]));
      grad_roots.push_back(std::move(grad_outputs[i]));
    }
    std::vector<at::Tensor*> places;  // of the gradients of the leaves
    torch::autograd::variable_list of_inputs(inputs.size()), of_parameters(parameters_.size());
    const auto add_leaf = [&](const at::Tensor& x, at::Tensor& place) {
      if (!x.requires_grad()) return;
      leaves.push_back(x);
      places.push_back(&place);
    };
    for (std::size_t i = 0; i < inputs.size(); ++i) add_leaf(inputs[i], of_inputs[i]);
    for (std::size_t i = 0; i < parameters_.size(); ++i) add_leaf(parameters_[i], of_parameters[i]);
    if (roots.empty() || leaves.empty()) return of_inputs;
    check_leaves(roots, leaves);
    const at::Tensor source = GradientSource::apply(at::TensorList(roots), c10::IValue(std::move(grad_roots)));
    roots.clear();
    {
      const HooksAside aside(parameters_);
      auto grads = torch::autograd::grad({source}, leaves, {}, /*retain_graph=*/false, /*create_graph=*/false,
                                         /*allow_unused=*/true);
      for (std::size_t i = 0; i < places.size(); ++i) *places[i] = std::move(grads[i]);
    }
    for (std::size_t i = 0; i < parameters_.size(); ++i) add(sums_[i], std::move(of_parameters[i]));
    return of_inputs;
  }

  /// Of the parameters, in their order; undefined where nothing depends on one.
  const std::vector<at::Tensor>& sums() const { return sums_; }

 private:
  /// Takes the tensor hooks away from parameters while it lives: they are for the sum, not for its terms.
  class HooksAside {
   public:
    explicit HooksAside(const std::vector<at::Tensor>& parameters) {
      aside_.reserve(parameters.size());
      for (const at::Tensor& p : parameters) {
        auto* const meta = torch::autograd::impl::get_autograd_meta(p);
        if (meta != nullptr && !meta->hooks_.empty()) aside_.emplace_back(meta, std::exchange(meta->hooks_, {}));
      }
    }
    ~HooksAside() {
      for (auto& [meta, hooks] : aside_) meta->hooks_ = std::move(hooks);
    }
    HooksAside(const HooksAside&) = delete;
    HooksAside& operator=(const HooksAside&) = delete;

   private:
    std::vector<
        std::pair<torch::autograd::AutogradMeta*, std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>>>
        aside_;
  };

  static void add(at::Tensor& sum, at::Tensor term) {
    if (!term.defined()) return;
    if (sum.defined()) {
      sum.add_(term);
    } else {
      // Nobody else may hold what is added to
      sum = term.use_count() == 1 && term.storage().use_count() == 1 && !term.is_sparse() ? std::move(term)
                                                                                          : term.clone();
    }
  }

  static void check_leaves(const torch::autograd::variable_list& roots, const torch::autograd::variable_list& leaves) {
    std::unordered_set<const void*> known;
    std::unordered_set<torch::autograd::Node*> seen;
    for (const at::Tensor& x : leaves) {
      known.insert(x.unsafeGetTensorImpl());
      if (!x.is_leaf()) seen.insert(x.grad_fn().get());  // a parameter that depends on others ends the piece
    }
    const auto check = [&](const at::Tensor& leaf) {
      require(known.contains(leaf.unsafeGetTensorImpl()), "headroom.checkpoint.captured", "forward uses a tensor ",
              leaf.sizes(),
              " that needs a gradient and is neither its input nor among the parameters, so that it would get none; "
              "add it to the parameters, or use checkpoint()");
    };
    std::vector<torch::autograd::Node*> todo;
    const auto visit = [&](torch::autograd::Node* node) {
      if (node != nullptr && seen.insert(node).second) todo.push_back(node);
    };
    for (const at::Tensor& root : roots) root.is_leaf() ? check(root) : visit(root.grad_fn().get());
    while (!todo.empty()) {
      torch::autograd::Node* const node = todo.back();
      todo.pop_back();
      if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) check(leaf->variable);
      for (const auto& edge : node->next_edges()) visit(edge.function.get());
    }
  }

  std::vector<at::Tensor> parameters_, sums_;
};

}  // namespace headroom::inline v0::detail
