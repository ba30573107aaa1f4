#pragma once

#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <memory>
#include <tuple>
#include <vector>

#include "headroom/optim/adamw.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/muon.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/prodigy.hpp"
#include "headroom/optim/radam.hpp"
#include "headroom/optim/sgd.hpp"
#include "headroom/training/parameter_names.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

namespace detail {

/// An optimizer over parameters in two groups; vectors and scalars (norms, biases) are not
/// decayed.
template <class Optimizer, class Options>
std::unique_ptr<optim::Optimizer> make_optimizer(const NamedParameters& parameters, const TrainingConfig& config,
                                                 const Options& options) {
  std::vector<torch::Tensor> matrices, vectors;
  for (const auto& [name, parameter] : parameters) (parameter.dim() >= 2 ? matrices : vectors).push_back(parameter);
  const auto with_decay = [&](double weight_decay) {
    return std::make_unique<Options>(Options(options).weight_decay(weight_decay));
  };
  // LibTorch puts defaults in the place of options that are as constructed, so these are, too
  return std::make_unique<Optimizer>(
      std::vector<torch::optim::OptimizerParamGroup>{{matrices, with_decay(config.weight_decay)},
                                                     {vectors, with_decay(0)}},
      Options(config.learning_rate), optim::moment_format(config.optimizer_state));
}

}  // namespace detail

/// The optimizer of a configuration over parameters.
inline std::unique_ptr<optim::Optimizer> make_optimizer(const NamedParameters& parameters,
                                                        const TrainingConfig& config) {
  const double rate = config.learning_rate;
  const std::tuple<double, double> betas(config.betas[0], config.betas[1]);
  if (config.optimizer == "radam") {
    return detail::make_optimizer<optim::RAdam>(parameters, config, torch::optim::AdamWOptions(rate).betas(betas));
  }
  if (config.optimizer == "muon") {
    return detail::make_optimizer<optim::Muon>(parameters, config,
                                               optim::MuonOptions(rate).betas(betas).momentum(config.momentum));
  }
  if (config.optimizer == "prodigy") {
    return detail::make_optimizer<optim::Prodigy>(
        parameters, config, optim::ProdigyOptions(rate).betas(betas).safeguard_warmup(config.warmup_steps > 0));
  }
  if (config.optimizer == "sgd") {
    return detail::make_optimizer<optim::Sgd>(parameters, config,
                                              torch::optim::SGDOptions(rate).momentum(config.momentum));
  }
  return detail::make_optimizer<optim::AdamW>(parameters, config, torch::optim::AdamWOptions(rate).betas(betas));
}

}  // namespace headroom::inline v0::training
