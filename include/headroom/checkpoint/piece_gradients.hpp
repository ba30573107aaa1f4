#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::detail {

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

/// Gradients of a network that a node of the graph differentiates piece by piece inside its own backward. Those of the
/// parameters are added up here, to be returned once: hooks of a parameter see the sum, as they would without pieces.
class PieceGradients {
 public:
  explicit PieceGradients(std::vector<at::Tensor> parameters)
      : parameters_(std::move(parameters)), sums_(parameters_.size()) {}

  /// Gradients of `inputs`, leaves made for this piece, given that of `output`. Adds those of the parameters.
  /// Throws headroom.checkpoint.captured when the piece depends on a leaf that is neither.
  torch::autograd::variable_list differentiate(const at::Tensor& output, const torch::autograd::variable_list& inputs,
                                               const at::Tensor& grad_output) {
    torch::autograd::variable_list leaves;
    std::vector<std::size_t> places;
    for (const at::Tensor& x : inputs) {
      if (x.requires_grad()) leaves.push_back(x);
    }
    const std::size_t count = leaves.size();
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!parameters_[i].requires_grad()) continue;
      leaves.push_back(parameters_[i]);
      places.push_back(i);
    }
    if (!checked_) check_leaves(output, leaves);
    checked_ = true;
    torch::autograd::variable_list grads;
    {
      const HooksAside aside(parameters_);
      grads = torch::autograd::grad({output}, leaves, {grad_output}, /*retain_graph=*/false, /*create_graph=*/false,
                                    /*allow_unused=*/true);
    }
    for (std::size_t i = 0; i < places.size(); ++i) add(sums_[places[i]], std::move(grads[count + i]));
    torch::autograd::variable_list of_inputs(inputs.size());
    for (std::size_t i = 0, next = 0; i < inputs.size(); ++i) {
      if (inputs[i].requires_grad()) of_inputs[i] = std::move(grads[next++]);
    }
    return of_inputs;
  }

  /// Of the parameters, in their order; undefined where nothing depends on one.
  const std::vector<at::Tensor>& sums() const { return sums_; }

 private:
  /// Takes the tensor hooks away from parameters while it lives: they are for the sum, not for its terms.
  class HooksAside {
   public:
    explicit HooksAside(const std::vector<at::Tensor>& parameters) {
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

  static void check_leaves(const at::Tensor& output, const torch::autograd::variable_list& leaves) {
    std::unordered_set<const void*> known;
    for (const at::Tensor& x : leaves) known.insert(x.unsafeGetTensorImpl());
    std::vector<torch::autograd::Node*> todo;
    std::unordered_set<torch::autograd::Node*> seen;
    const auto visit = [&](torch::autograd::Node* node) {
      if (node != nullptr && seen.insert(node).second) todo.push_back(node);
    };
    visit(output.grad_fn().get());
    while (!todo.empty()) {
      torch::autograd::Node* const node = todo.back();
      todo.pop_back();
      if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
        require(known.contains(leaf->variable.unsafeGetTensorImpl()), "headroom.checkpoint.captured",
                "forward uses a tensor ", leaf->variable.sizes(),
                " that needs a gradient and is neither its input nor among the parameters, so that it would get none; "
                "add it to the parameters, or use checkpoint()");
      }
      for (const auto& edge : node->next_edges()) visit(edge.function.get());
    }
  }

  std::vector<at::Tensor> parameters_, sums_;
  bool checked_ = false;
};

}  // namespace headroom::inline v0::detail
