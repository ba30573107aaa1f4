#pragma once

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"

namespace headroom::inline v0::optim {

/// Gradient descent with momentum, with the bits of torch::optim::SGD for MomentFormat::full. Its weight decay is added
/// to the gradient. Bytes of state for each element of a parameter: full 4, bf16 2, 8bit 1.02; none without momentum.
class Sgd : public Optimizer {
 public:
  /// Over groups of parameters, each with options of its own or `defaults`; `format` is that of its state.
  Sgd(const std::vector<torch::optim::OptimizerParamGroup>& groups, const torch::optim::SGDOptions& defaults,
      MomentFormat format = MomentFormat::full)
      : Optimizer(groups, std::make_unique<torch::optim::SGDOptions>(defaults), format) {
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      has_momentum_ |= options_of<torch::optim::SGDOptions>(group).momentum() != 0;
    }
  }
  /// Over one group.
  Sgd(std::vector<torch::Tensor> parameters, const torch::optim::SGDOptions& defaults,
      MomentFormat format = MomentFormat::full)
      : Sgd({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults, format) {}

  std::string name() const override { return "Sgd"; }

  void update(size_t group, const torch::Tensor& parameter) override {
    const at::NoGradGuard guard;
    const auto& options = options_of<torch::optim::SGDOptions>(group);
    // All that allocates comes first; what is changed in place comes last
    torch::Tensor direction = gradient_of(parameter);
    const torch::Tensor exact = parameter.to(computed_type(parameter));
    if (options.weight_decay() != 0) direction = direction.add(exact, options.weight_decay());
    ParameterState& state = state_for(parameter);
    if (options.momentum() != 0) {
      const auto [decay] = constants(exact.scalar_type(), {options.momentum()});
      StoredMoment& kept = state.moments.at("momentum_buffer");
      const torch::Tensor momentum = moments_.load(kept, parameter);
      torch::Tensor ahead = options.nesterov() ? at::empty_like(direction) : torch::Tensor();
      momentum.mul_(decay).add_(direction, state.step == 0 ? 1 : 1 - options.dampening());
      direction = options.nesterov() ? at::add_out(ahead, direction, momentum, options.momentum()) : momentum;
      kept.copy_(moments_.round(kept, momentum, state.step + 1));
    }
    exact.add_(direction, -options.lr());
    if (!exact.is_same(parameter)) parameter.copy_(exact);
    ++state.step;
  }

  std::unique_ptr<ParameterState> zero_state(const torch::Tensor& parameter) override {
    auto state = std::make_unique<ParameterState>();
    if (has_momentum_) state->moments.emplace("momentum_buffer", moments_.zero(parameter, true));
    return state;
  }

 private:
  bool has_momentum_ = false;
};

}  // namespace headroom::inline v0::optim
