#pragma once

#include <ATen/ATen.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "headroom/runtime/gradient_hooks.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/parameter_names.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/state.hpp"

// LoRA (Hu et al. 2022, arXiv:2106.09685) trains a change of low rank of a matrix: W + alpha / rank * B A, with A
// [rank,in] and B [out,rank]. Here W itself always is the changed matrix, so that the model runs as it is: its gradient
// becomes that of A and B as soon as it is complete, and after a step W changes as B A did.

namespace headroom::inline v0::training {

/// Low-rank changes of matrices of a model, whose other parameters are not trained.
///
/// Bytes: 8 for each element of A and B and their moments; of the matrices' gradients one at a time is there.
class LowRank {
 public:
  /// Of the matrices of modules whose names match config.layers. A is drawn from LibTorch's
  /// generator of random numbers, B is zero. Throws headroom.training.pattern.
  LowRank(torch::nn::Module& module, const LoraConfig& config)
      : scale_(config.alpha / static_cast<double>(config.rank)) {
    const torch::NoGradGuard guard;
    const NamedParameters parameters = named_parameters(module);
    const std::set<std::string> chosen = chosen_names(parameters, config.layers);
    for (const auto& [name, parameter] : parameters) {
      torch::Tensor(parameter).requires_grad_(chosen.contains(name));
      if (!chosen.contains(name)) continue;
      const double bound = 1 / std::sqrt(static_cast<double>(parameter.size(1)));
      const auto options = parameter.options().requires_grad(false);
      const torch::Tensor a = torch::empty({config.rank, parameter.size(1)}, options).uniform_(-bound, bound);
      const torch::Tensor b = torch::zeros({parameter.size(0), config.rank}, options);
      changes_.push_back({name, parameter, a, b, a.clone(), b.clone()});
    }
    for (const Change& change : changes_) {
      change.a.requires_grad_(), change.b.requires_grad_();
      hooks_.add(change.matrix, [a = change.a, b = change.b, scale = scale_](const torch::Tensor& matrix) {
        move_gradient(matrix, a, b, scale);
      });
    }
  }
  LowRank(const LowRank&) = delete;
  LowRank& operator=(const LowRank&) = delete;

  /// What is trained: "<matrix>.lora_a" and "<matrix>.lora_b".
  NamedParameters parameters() const {
    NamedParameters parameters;
    for (const Change& change : changes_) {
      parameters.emplace_back(change.name + ".lora_a", change.a);
      parameters.emplace_back(change.name + ".lora_b", change.b);
    }
    return parameters;
  }

  /// Changes the matrices as A and B changed since the last time. May be called again after it threw.
  void apply() {
    const torch::NoGradGuard guard;
    for (const Change& c : changes_) {
      const torch::Tensor by_a = c.a - c.applied_a, by_b = c.b - c.applied_b;
      torch::Tensor matrix = c.matrix;
      matrix.addmm_(by_b, c.a, 1, scale_).addmm_(c.applied_b, by_a, 1, scale_);  // B A - B' A'
      c.applied_a.copy_(c.a);
      c.applied_b.copy_(c.b);
    }
  }

  /// Takes A and B from a saved state, whose matrices have the changes in them. Throws
  /// headroom.training.state.structure.
  void restore(const TensorMap& saved, const std::string& what) {
    TensorMap target;
    for (const auto& [name, parameter] : parameters()) target.emplace(name, parameter);
    copy_tensors(saved, target, what);
    const torch::NoGradGuard guard;
    for (const Change& c : changes_) {
      c.applied_a.copy_(c.a);
      c.applied_b.copy_(c.b);
    }
  }

 private:
  struct Change {
    std::string name;
    torch::Tensor matrix, a, b;
    torch::Tensor applied_a, applied_b;  ///< that the matrix has in it
  };

  /// Turns the gradient of a matrix into those of A and B, and frees it.
  static void move_gradient(const torch::Tensor& matrix, const torch::Tensor& a, const torch::Tensor& b, double scale) {
    const torch::NoGradGuard guard;
    const torch::Tensor& gradient = matrix.grad();
    add(a, at::mm(b.t(), gradient).mul_(scale));
    add(b, at::mm(gradient, a.t()).mul_(scale));
    matrix.mutable_grad().reset();
  }
  static void add(const torch::Tensor& parameter, const torch::Tensor& gradient) {
    torch::Tensor& sum = parameter.mutable_grad();
    sum.defined() ? sum.add_(gradient) : sum = gradient;
  }

  static std::set<std::string> chosen_names(const NamedParameters& parameters,
                                            const std::vector<std::string>& patterns) {
    std::vector<std::string> modules;  // of matrices
    for (const auto& [name, parameter] : parameters) {
      if (parameter.dim() == 2) modules.push_back(name.substr(0, name.rfind('.')));
    }
    const std::set<std::string> chosen = matching_names(patterns, modules, "lora.layers");
    std::set<std::string> names;
    for (const auto& [name, parameter] : parameters) {
      if (parameter.dim() == 2 && chosen.contains(name.substr(0, name.rfind('.')))) names.insert(name);
    }
    return names;
  }

  std::vector<Change> changes_;
  double scale_;
  GradientHooks hooks_;
};

}  // namespace headroom::inline v0::training
