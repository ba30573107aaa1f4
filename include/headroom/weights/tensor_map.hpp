#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <map>
#include <string>

namespace headroom::inline v0::weights {

/// Tensors by name.
using TensorMap = std::map<std::string, torch::Tensor>;

/// Parameters and buffers of a module by name; they share memory with the module.
inline TensorMap tensors_of(const torch::nn::Module& module) {
  TensorMap tensors;
  for (const auto& parameter : module.named_parameters()) tensors.emplace(parameter.key(), parameter.value());
  for (const auto& buffer : module.named_buffers()) tensors.emplace(buffer.key(), buffer.value());
  return tensors;
}

}  // namespace headroom::inline v0::weights
