#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <map>
#include <string>

#include "headroom/optim/moment.hpp"

namespace headroom::inline v0::optim {

/// What an optimizer knows of a parameter.
struct ParameterState : torch::optim::OptimizerCloneableParamState<ParameterState> {
  int64_t step = 0;                             ///< updates so far
  std::map<std::string, StoredMoment> moments;  ///< by the names that PyTorch gives them: "exp_avg", …

  /// Calls f(name, tensor) for each tensor. Those of squares have a name of their own for the scales of their codes,
  /// which stand for other numbers.
  void each_tensor(auto&& f) const {
    for (const auto& [name, moment] : moments) {
      f(name, moment.values);
      if (moment.scales.defined()) f(name + (moment.is_signed ? ".scales" : ".squared_code_scales"), moment.scales);
    }
  }
};

}  // namespace headroom::inline v0::optim
