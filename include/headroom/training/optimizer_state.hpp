#pragma once

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"
#include "headroom/training/parameter_names.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

namespace detail {

/// The step count and the moments of a parameter under the names of a saved state: as PyTorch calls them, with scales
/// beside those that are quantised.
inline void add_parameter_state(TensorMap& tensors, const std::string& parameter, const optim::ParameterState& state) {
  tensors.emplace(parameter + ".step", torch::tensor(state.step));
  state.each_tensor(
      [&](const std::string& name, const torch::Tensor& tensor) { tensors.emplace(parameter + "." + name, tensor); });
}

}  // namespace detail

/// What an optimizer knows, as tensors named after its parameters, and numbers of its own.
inline TensorMap optimizer_tensors(optim::Optimizer& optimizer, const NamedParameters& parameters) {
  TensorMap tensors;
  for (const auto& [name, parameter] : parameters) {
    if (optimizer.knows(parameter)) detail::add_parameter_state(tensors, name, optimizer.state_for(parameter));
  }
  for (const auto& [name, number] : optimizer.numbers()) tensors.emplace(name, torch::tensor(*number, torch::kDouble));
  return tensors;
}

/// How many bytes a file takes at most of what an optimizer will know of the parameters that it does not know yet.
/// Makes it of one parameter after the other.
inline std::uint64_t file_bytes_to_come(optim::Optimizer& optimizer, const NamedParameters& parameters) {
  std::uint64_t bytes = 0;
  for (const auto& [name, parameter] : parameters) {
    if (optimizer.knows(parameter)) continue;
    TensorMap tensors;
    detail::add_parameter_state(tensors, name, *optimizer.zero_state(parameter));
    bytes += file_bytes(tensors);
  }
  return bytes;
}

/// Undoes optimizer_tensors. Throws headroom.training.state.structure like copy_tensors, also for moments that were
/// stored in another format and for those of another optimizer; nothing is changed then.
inline void restore_optimizer(optim::Optimizer& optimizer, const NamedParameters& parameters, const TensorMap& tensors,
                              const std::string& what) {
  TensorMap target;
  std::map<std::string, std::pair<torch::Tensor, std::unique_ptr<optim::ParameterState>>> states;
  for (const auto& [name, parameter] : parameters) {
    if (!tensors.contains(name + ".step")) continue;  // the optimizer never updated it
    auto state = optimizer.zero_state(parameter);
    detail::add_parameter_state(target, name, *state);
    states.emplace(name, std::pair(parameter, std::move(state)));
  }
  for (const auto& [name, number] : optimizer.numbers()) target.emplace(name, torch::tensor(*number, torch::kDouble));
  copy_tensors(tensors, target, what);
  optimizer.state().clear();
  for (auto& [name, known] : states) {
    auto& [parameter, state] = known;
    state->step = target.at(name + ".step").item<int64_t>();
    optimizer.state()[parameter.unsafeGetTensorImpl()] = std::move(state);
  }
  for (const auto& [name, number] : optimizer.numbers()) *number = target.at(name).item<double>();
}

}  // namespace headroom::inline v0::training
