#pragma once

#include <torch/nn/module.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/types.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

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

  /// Norm of all gradients together, which becomes training.clip_grad_norm where it was more.
  double clip_gradients() {
    std::vector<torch::Tensor> parameters;
    for (const auto& [name, parameter] : trained_) parameters.push_back(parameter);
    return torch::nn::utils::clip_grad_norm_(parameters, limit_ > 0 ? limit_ : std::numeric_limits<double>::infinity());
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
