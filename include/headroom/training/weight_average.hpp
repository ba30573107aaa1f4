#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "headroom/runtime/phase.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

/// An exponential moving average (EMA) over steps of the parameters of a module that are trained: after each step
/// average += (1 - decay) * (weight - average). It begins with the weights as they are. Memory: one copy of these
/// parameters in float, in double for double ones.
class WeightAverage {
 public:
  WeightAverage(const torch::nn::Module& module, double decay) : decay_(decay) {
    const torch::NoGradGuard guard;
    const Phase phase("optimizer");  // its bytes count as the optimizer's
    for (const auto& parameter : module.named_parameters()) {
      if (!parameter.value().requires_grad()) continue;
      const auto type = at::promote_types(parameter.value().scalar_type(), torch::kFloat);
      averages_.push_back({parameter.key(), parameter.value(),
                           parameter.value().detach().to(type, /*non_blocking=*/false, /*copy=*/true)});
    }
  }

  /// Begins anew, with the weights as they are.
  void begin() {
    const torch::NoGradGuard guard;
    for (const Average& a : averages_) torch::Tensor(a.average).copy_(a.parameter);
    next_ = 0;
  }

  /// After a step. Called again after it threw, it goes on where it was.
  void update() {
    const torch::NoGradGuard guard;
    for (; next_ < averages_.size(); ++next_) {
      const Average& a = averages_[next_];
      a.average.lerp_(a.parameter.to(a.average.scalar_type()), 1 - decay_);
    }
    next_ = 0;
  }

  /// The averages by the names of their parameters; they share memory.
  TensorMap tensors() const {
    TensorMap tensors;
    for (const Average& a : averages_) tensors.emplace(a.name, a.average);
    return tensors;
  }

  /// While it lives the parameters are the averages. Nothing is copied, but for parameters of 16 bits.
  class InUse {
   public:
    explicit InUse(const WeightAverage& of) {
      const torch::NoGradGuard guard;
      for (const Average& a : of.averages_) {
        changed_.push_back({a.parameter, a.parameter.tensor_data(), a.average.to(a.parameter.scalar_type())});
      }
      for (Changed& c : changed_) c.parameter.set_data(std::exchange(c.average, {}));  // once nothing can fail any more
    }
    ~InUse() {
      for (const Changed& c : changed_) c.parameter.set_data(c.weights);
    }
    InUse(const InUse&) = delete;
    InUse& operator=(const InUse&) = delete;

   private:
    struct Changed {
      torch::Tensor parameter, weights, average;
    };
    std::vector<Changed> changed_;
  };

 private:
  struct Average {
    std::string name;
    torch::Tensor parameter, average;
  };
  std::vector<Average> averages_;
  double decay_;
  std::size_t next_ = 0;  ///< of an update under way
};

}  // namespace headroom::inline v0::training
