#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/optim/adamw.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"

namespace headroom::inline v0::optim {

/// Options of a group of Prodigy's. `lr`, `d0`, `betas`, `d_coef` and `safeguard_warmup` are the same in all groups.
struct ProdigyOptions : torch::optim::OptimizerCloneableOptions<ProdigyOptions> {
  explicit ProdigyOptions(double learning_rate = 1) : lr_(learning_rate) {}
  /// Factor of the learning rate that is found; 1 is usual, a schedule lowers it.
  TORCH_ARG(double, lr);
  using betas_t = std::tuple<double, double>;
  TORCH_ARG(betas_t, betas) = {0.9, 0.999};
  TORCH_ARG(double, eps) = 1e-8;
  /// Decoupled.
  TORCH_ARG(double, weight_decay) = 0;
  /// The first estimate of the distance.
  TORCH_ARG(double, d0) = 1e-6;
  /// Factor of the estimates.
  TORCH_ARG(double, d_coef) = 1;
  /// Leaves `lr` out of what the numerator is divided by, for a warm-up.
  TORCH_ARG(bool, safeguard_warmup) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double rate) override { lr_ = rate; }
  void serialize(torch::serialize::OutputArchive& archive) const override {
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(betas);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(d0);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(d_coef);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(safeguard_warmup);
  }
  void serialize(torch::serialize::InputArchive& archive) override {
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(betas_t, betas);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, d0);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, d_coef);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, safeguard_warmup);
  }
};

/// Prodigy (Mishchenko & Defazio 2024, arXiv:2306.06101), as the package prodigyopt 1.1.2 has it: Adam whose learning
/// rate is d, an estimate of how far the solution is from where training began, that grows from d0. Every step looks at
/// all gradients before it updates the first parameter. Bytes of state for each element of a float parameter: full 16,
/// bf16 12, 8bit 10.03, of which 8 are where it began and a sum of its gradients.
class Prodigy : public Optimizer {
 public:
  /// Over groups of parameters, each with options of its own or `defaults`; `format` is that of its state.
  explicit Prodigy(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                   const ProdigyOptions& defaults = ProdigyOptions(), MomentFormat format = MomentFormat::full)
      : Optimizer(groups, std::make_unique<ProdigyOptions>(defaults), format), d_(first().d0()) {}
  /// Over one group.
  explicit Prodigy(std::vector<torch::Tensor> parameters, const ProdigyOptions& defaults = ProdigyOptions(),
                   MomentFormat format = MomentFormat::full)
      : Prodigy({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults, format) {}

  std::string name() const override { return "Prodigy"; }
  bool needs_all_gradients() const override { return true; }

  /// The estimate of the distance.
  double d() const { return d_; }

  std::map<std::string, double*> numbers() override { return {{"d", &d_}, {"d_numerator", &numerator_}}; }

  /// The step that was decided on.
  void update(size_t group, const torch::Tensor& parameter) override {
    if (denominator_ == 0) return;  // no gradient but zero
    const at::NoGradGuard guard;
    const auto& options = options_of<ProdigyOptions>(group);
    ParameterState& state = state_for(parameter);
    const auto [decay, eps] =
        constants(computed_type(parameter), {1 - options.weight_decay() * rate_, d_ * options.eps()});
    const torch::Tensor exact = parameter.to(computed_type(parameter));
    const StoredMoment& kept = state.moments.at("exp_avg");
    const torch::Tensor average = moments_.load(kept, parameter);
    const torch::Tensor denominator = moments_.load(state.moments.at("exp_avg_sq"), parameter).sqrt().add_(eps);
    if (options.weight_decay() != 0) exact.mul_(decay);
    const auto [beta1, beta2] = options.betas();
    std::optional<double> most;
    if (kept.scales.defined()) most = detail::largest_ratio(beta1, beta2, state.step + 1);
    detail::move_by_ratio(exact, average, denominator, rate_, most);
    if (!exact.is_same(parameter)) parameter.copy_(exact);
    ++state.step;
  }

  std::unique_ptr<ParameterState> zero_state(const torch::Tensor& parameter) override {
    const at::NoGradGuard guard;
    auto state = std::make_unique<ParameterState>();
    const auto type = computed_type(parameter);
    state->moments.emplace("exp_avg", moments_.zero(parameter, true));
    state->moments.emplace("exp_avg_sq", moments_.zero(parameter, false));
    state->moments.emplace("p0", StoredMoment{parameter.detach().to(type, false, /*copy=*/true), {}});
    state->moments.emplace("s", StoredMoment{MomentStore::zeros(parameter, type), {}});
    return state;
  }

 protected:
  void begin_step() override {
    new_numerator_ = denominator_ = 0;
    rate_ = d_ * first().lr();
  }

  void see(size_t group, const torch::Tensor& parameter) override {
    const at::NoGradGuard guard;
    const auto& options = options_of<ProdigyOptions>(group);
    const auto [first_beta, second] = options.betas();
    const double third = std::sqrt(second), relative = d_ / options.d0();
    // All that allocates comes first; what is changed in place comes last
    const torch::Tensor gradient = gradient_of(parameter);
    ParameterState& state = state_for(parameter);
    StoredMoment &kept_average = state.moments.at("exp_avg"), &kept_square = state.moments.at("exp_avg_sq");
    const auto [beta1, beta2, beta3] = constants(gradient.scalar_type(), {first_beta, second, third});
    const torch::Tensor moved = state.moments.at("p0").values.sub(parameter);
    const double along = at::dot(gradient.reshape({-1}), moved.reshape({-1})).item<double>();
    const torch::Tensor& kept_sum = state.moments.at("s").values;
    const torch::Tensor sum = kept_sum.mul(beta3).add_(gradient, relative * (options.safeguard_warmup() ? d_ : rate_));
    const double size = at::linalg_vector_norm(sum, 1).item<double>();
    const torch::Tensor average = moments_.load(kept_average, parameter);
    const torch::Tensor square = moments_.load(kept_square, parameter);
    average.mul_(beta1).add_(gradient, d_ * (1 - first_beta));
    square.mul_(beta2).addcmul_(gradient, gradient, d_ * d_ * (1 - second));
    const StoredMoment new_average = moments_.round(kept_average, average, state.step + 1);
    const StoredMoment new_square = moments_.round(kept_square, square, state.step + 1);

    kept_average.copy_(new_average);
    kept_square.copy_(new_square);
    kept_sum.copy_(sum);
    new_numerator_ += relative * rate_ * along;
    denominator_ += size;
  }

  void decide() override {
    if (denominator_ == 0) return;
    const ProdigyOptions& options = first();
    numerator_ = numerator_ * std::sqrt(std::get<1>(options.betas())) + new_numerator_;
    d_ = std::max(d_, options.d_coef() * numerator_ / denominator_);
  }

 private:
  const ProdigyOptions& first() const { return options_of<ProdigyOptions>(0); }

  double d_, numerator_ = 0;
  double new_numerator_ = 0, denominator_ = 0, rate_ = 0;  ///< of the step under way
};

}  // namespace headroom::inline v0::optim
