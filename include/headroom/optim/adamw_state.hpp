#pragma once

#include <ATen/core/ivalue.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "headroom/optim/moment.hpp"

namespace headroom::inline v0::optim {

/// What AdamW knows of a parameter.
struct AdamWState : torch::optim::OptimizerCloneableParamState<AdamWState> {
  int64_t step = 0;
  StoredMoment average;  ///< of the gradient
  StoredMoment square;   ///< of its square

  /// Under "step", "exp_avg", "exp_avg_sq" and, of quantised moments, with "_scales" behind these.
  void serialize(torch::serialize::OutputArchive& archive) const override {
    archive.write("step", c10::IValue(step));
    const auto write = [&](const std::string& name, const StoredMoment& moment) {
      archive.write(name, moment.values);
      if (moment.scales.defined()) archive.write(name + "_scales", moment.scales);
    };
    write("exp_avg", average);
    write("exp_avg_sq", square);
  }
  void serialize(torch::serialize::InputArchive& archive) override {
    c10::IValue number;
    archive.read("step", number);
    step = number.toInt();
    const auto read = [&](const std::string& name, StoredMoment& moment) {
      moment = {};
      archive.read(name, moment.values);
      archive.try_read(name + "_scales", moment.scales);
    };
    read("exp_avg", average);
    read("exp_avg_sq", square);
  }
};

namespace detail {

/// The largest |average| / sqrt(square) after `steps` steps, whatever the gradients were (Cauchy-Schwarz); what exact
/// moments cannot exceed. Both averages without bias correction; infinite where the square forgets at once.
inline double largest_ratio(double beta1, double beta2, int64_t steps) {
  if (beta2 == 0) return INFINITY;
  const double q = beta1 * beta1 / beta2;
  const auto n = static_cast<double>(steps);
  return (1 - beta1) / std::sqrt(1 - beta2) * std::sqrt(q == 1 ? n : (1 - std::pow(q, n)) / (1 - q));
}

}  // namespace detail

}  // namespace headroom::inline v0::optim
