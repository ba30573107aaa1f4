#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "headroom/core/finite.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/low_rank.hpp"
#include "headroom/training/optimizer.hpp"
#include "headroom/training/optimizer_state.hpp"
#include "headroom/training/parameter_names.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/weight_average.hpp"

namespace headroom::inline v0::training {

/// What is trained of a model, and what becomes of it after the passes of a step.
class Updates {
 public:
  /// Freezes what the configuration freezes. Throws headroom.training.pattern.
  Updates(torch::nn::Module& module, const Config& config)
      : limit_(config.training.clip_grad_norm), low_rank_(make_low_rank(module, config)) {
    if (low_rank_) {
      trained_ = low_rank_->parameters();
    } else {
      freeze(module, config.training.freeze);
      for (const auto& [name, parameter] : named_parameters(module)) {
        if (parameter.requires_grad()) trained_.emplace_back(name, parameter);
      }
    }
    optimizer_ = make_optimizer(trained_, config.training);
    if (config.training.ema_decay > 0) average_.emplace(module, config.training.ema_decay);
  }

  optim::Optimizer& optimizer() { return *optimizer_; }

  void set_learning_rate(double rate) {
    for (auto& group : optimizer_->param_groups()) group.options().set_lr(rate);
  }

  /// What is trained: parameters of the module, or LoRA's.
  const NamedParameters& trained() const { return trained_; }

  /// Norm of all gradients together, which becomes training.clip_grad_norm where it was more: as
  /// torch::nn::utils::clip_grad_norm_, bit for bit. Where it is not finite nothing is scaled.
  double clip_gradients() const {
    std::vector<torch::Tensor> gradients, norms;
    for (const auto& [name, parameter] : trained_) {
      if (parameter.grad().defined()) gradients.push_back(parameter.grad());
    }
    if (gradients.empty()) return 0;
    for (const torch::Tensor& gradient : gradients) norms.push_back(gradient.norm());
    const torch::Tensor norm = norms.size() == 1 ? norms[0] : torch::stack(norms).norm();
    const double value = norm.item<double>();
    if (limit_ <= 0 || !core::detail::is_finite(value)) return value;
    const torch::Tensor factor = (limit_ / (norm + 1e-6)).clamp_max(1.0);
    for (const torch::Tensor& gradient : gradients) gradient.mul_(factor);
    return value;
  }

  /// After the optimizer's step. May be called again where memory ran out.
  void finish_step() {
    const Phase phase("optimizer");
    if (low_rank_) low_rank_->apply();
    if (average_) average_->update();
  }

  /// While the result lives the model has the averaged weights, if there are any.
  [[nodiscard]] std::unique_ptr<WeightAverage::InUse> with_averages() const {
    return average_ ? std::make_unique<WeightAverage::InUse>(*average_) : nullptr;
  }

  /// Adds what it knows to a state; the tensors share memory.
  void save(TrainingState& state) const {
    state.optimizer = optimizer_tensors(*optimizer_, trained_);
    if (low_rank_) {
      for (const auto& [name, parameter] : low_rank_->parameters()) state.lora.emplace(name, parameter);
    }
    if (average_) state.ema = average_->tensors();
  }

  /// How many bytes the file of a state takes at most once the optimizer knows every parameter; `now` is one of before.
  std::uint64_t file_bytes(const TrainingState& now) {
    constexpr std::uint64_t kRest = 1 << 18;  // losses, configuration, random generators
    std::uint64_t bytes = kRest;
    for (const TensorMap* tensors : {&now.model, &now.lora, &now.ema, &now.optimizer}) {
      bytes += training::file_bytes(*tensors);
    }
    return bytes + file_bytes_to_come(*optimizer_, trained_);
  }

  /// Goes on from a state, whose model has been taken; averages begin anew where it has none. Throws
  /// headroom.training.state.structure.
  void restore(const TrainingState& state, const std::string& what) {
    if (low_rank_ && !state.lora.empty()) low_rank_->restore(state.lora, what);
    restore_optimizer(*optimizer_, trained_, state.optimizer, what);
    if (!average_) return;
    state.ema.empty() ? average_->begin() : copy_tensors(state.ema, average_->tensors(), what);
  }

 private:
  static std::unique_ptr<LowRank> make_low_rank(torch::nn::Module& module, const Config& config) {
    return config.lora.rank > 0 ? std::make_unique<LowRank>(module, config.lora) : nullptr;
  }

  double limit_;
  std::unique_ptr<LowRank> low_rank_;
  NamedParameters trained_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  std::optional<WeightAverage> average_;
};

}  // namespace headroom::inline v0::training
