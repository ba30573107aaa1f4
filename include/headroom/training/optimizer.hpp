#pragma once

#include <torch/nn/module.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <memory>
#include <vector>

#include "headroom/optim/adamw.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

/// AdamW over all parameters of a module; vectors and scalars (norms, biases) are not decayed.
inline optim::AdamW make_optimizer(const torch::nn::Module& model, const TrainingConfig& config) {
  std::vector<torch::Tensor> matrices, vectors;
  for (const torch::Tensor& parameter : model.parameters()) {
    (parameter.dim() >= 2 ? matrices : vectors).push_back(parameter);
  }
  const auto options = [&](double weight_decay) {
    return std::make_unique<torch::optim::AdamWOptions>(torch::optim::AdamWOptions(config.learning_rate)
                                                            .betas({config.betas[0], config.betas[1]})
                                                            .weight_decay(weight_decay));
  };
  return optim::AdamW(
      std::vector<torch::optim::OptimizerParamGroup>{{matrices, options(config.weight_decay)}, {vectors, options(0)}},
      {}, optim::moment_format(config.optimizer_state));
}

}  // namespace headroom::inline v0::training
