#pragma once

#include <ATen/ATen.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"

namespace headroom::inline v0::optim {

namespace detail {

/// The largest |average| / sqrt(square) after `steps` steps, whatever the gradients were (Cauchy-Schwarz); what exact
/// moments cannot exceed. Both averages without bias correction; infinite where the square forgets at once.
inline double largest_ratio(double beta1, double beta2, int64_t steps) {
  if (beta2 == 0) return INFINITY;
  const double q = beta1 * beta1 / beta2;
  const auto n = static_cast<double>(steps);
  return (1 - beta1) / std::sqrt(1 - beta2) * std::sqrt(q == 1 ? n : (1 - std::pow(q, n)) / (1 - q));
}

/// exact -= rate * average / denominator. Where there is a `most` no ratio is larger: that of quantised moments could
/// be.
inline void move_by_ratio(const at::Tensor& exact, const at::Tensor& average, const at::Tensor& denominator,
                          double rate, std::optional<double> most) {
  if (most) {
    exact.add_(average.div_(denominator).clamp_(-*most, *most), -rate);
  } else {
    exact.addcdiv_(average, denominator, -rate);
  }
}

}  // namespace detail

/// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a choice of how its two moments are stored. With
/// MomentFormat::full it gives the bits of torch::optim::AdamW for float and double parameters. Bytes of state for each
/// element of a float, bfloat16 or half parameter: full 8, bf16 4, 8bit 2.03. The arithmetic is in float, in double for
/// double parameters, constants included, whatever the types of parameters and formats; a parameter of 16 bits is
/// rounded once a step. A parameter at a time has its moments in float while it is updated.
///
/// With 8 bits no element moves further in a step than exact moments could have moved it.
///
/// amsgrad is not offered (headroom.optim.amsgrad).
class AdamW : public Optimizer {
 public:
  /// Over groups of parameters, each with options of its own or `defaults`; `format` is that of its state.
  /// Throws headroom.optim.amsgrad.
  explicit AdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                 const torch::optim::AdamWOptions& defaults = {}, MomentFormat format = MomentFormat::full)
      : AdamW(std::make_unique<torch::optim::AdamWOptions>(defaults), groups, format) {
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      require(!adamw_options(group).amsgrad(), "headroom.optim.amsgrad",
              "amsgrad is on, which headroom::optim::AdamW does not have; use torch::optim::AdamW for it");
    }
  }
  /// Over one group.
  explicit AdamW(std::vector<torch::Tensor> parameters, const torch::optim::AdamWOptions& defaults = {},
                 MomentFormat format = MomentFormat::full)
      : AdamW({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults, format) {}

  std::string name() const override { return "AdamW"; }

  void update(size_t group, const torch::Tensor& parameter) override {
    const at::NoGradGuard guard;
    const auto options = adamw_options(group);
    const auto [first, second] = options.betas();

    // All that allocates comes first; what is changed in place comes last
    const torch::Tensor gradient = gradient_of(parameter);
    ParameterState& state = state_for(parameter);
    StoredMoment &kept_average = state.moments.at("exp_avg"), &kept_square = state.moments.at("exp_avg_sq");
    const int64_t step = state.step + 1;
    const Pace pace = pace_at(options, step);
    const auto type = computed_type(parameter);
    const auto [decay, beta1, beta2, root, eps] =
        constants(type, {1 - options.lr() * options.weight_decay(), first, second, pace.root, options.eps()});
    const torch::Tensor exact = parameter.to(type);
    const torch::Tensor average = moments_.load(kept_average, parameter);
    const torch::Tensor square = moments_.load(kept_square, parameter);
    const torch::Tensor denominator = at::empty_like(square);
    average.mul_(beta1).add_(gradient, 1 - first);
    square.mul_(beta2).addcmul_(gradient, gradient, 1 - second);
    at::sqrt_out(const_cast<torch::Tensor&>(denominator), square).div_(root).add_(eps);
    const StoredMoment new_average = moments_.round(kept_average, average, step);
    const StoredMoment new_square = moments_.round(kept_square, square, step);

    if (options.weight_decay() != 0) exact.mul_(decay);
    if (!pace.by_square) {
      exact.add_(average, -pace.rate);
    } else {
      std::optional<double> most;
      if (kept_average.scales.defined()) most = detail::largest_ratio(first, second, step) * pace.root;
      detail::move_by_ratio(exact, average, denominator, pace.rate, most);
    }
    if (!exact.is_same(parameter)) parameter.copy_(exact);
    kept_average.copy_(new_average);
    kept_square.copy_(new_square);
    state.step = step;
  }

  std::unique_ptr<ParameterState> zero_state(const torch::Tensor& parameter) override {
    auto state = std::make_unique<ParameterState>();
    state->moments.emplace("exp_avg", moments_.zero(parameter, true));
    state->moments.emplace("exp_avg_sq", moments_.zero(parameter, false));
    return state;
  }

 protected:
  AdamW(std::unique_ptr<torch::optim::OptimizerOptions> defaults,
        const std::vector<torch::optim::OptimizerParamGroup>& groups, MomentFormat format)
      : Optimizer(groups, std::move(defaults), format) {}

  virtual torch::optim::AdamWOptions adamw_options(size_t group) const {
    return options_of<torch::optim::AdamWOptions>(group);
  }

  /// How far a step goes: rate * average / (sqrt(square) / root + eps), or rate * average.
  struct Pace {
    double rate, root;
    bool by_square = true;
  };
  /// Of AdamW: with the bias of both moments, which begin with zero, corrected.
  virtual Pace pace_at(const torch::optim::AdamWOptions& options, int64_t step) const {
    const auto [first, second] = options.betas();
    return {options.lr() / (1 - std::pow(first, step)), std::sqrt(1 - std::pow(second, step))};
  }
};

}  // namespace headroom::inline v0::optim
