#pragma once

#include <ATen/ATen.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/types.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/dry_run/device.hpp"
#include "headroom/optim/moment.hpp"

namespace headroom::inline v0::optim {

/// What AdamW knows of a parameter.
struct AdamWState : torch::optim::OptimizerCloneableParamState<AdamWState> {
  int64_t step = 0;
  StoredMoment average;  ///< of the gradient
  StoredMoment square;   ///< of its square
};

/// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a choice of how its two moments are stored. With
/// MomentFormat::full it gives the bits of torch::optim::AdamW for float and double parameters. Bytes of state for each
/// element of a float parameter: full 8, bf16 4, 8bit 2.03. The arithmetic is in float; a parameter at a time has its
/// moments in float while it is updated.
///
/// Options and groups are LibTorch's. amsgrad is not offered (headroom.optim.amsgrad), nor are sparse gradients
/// (headroom.optim.sparse).
class AdamW : public torch::optim::Optimizer {
 public:
  explicit AdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                 const torch::optim::AdamWOptions& defaults = {}, MomentFormat format = MomentFormat::full)
      : Optimizer(groups, std::make_unique<torch::optim::AdamWOptions>(defaults)), format_(format) {
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      require(!options_of(group).amsgrad(), "headroom.optim.amsgrad",
              "amsgrad is on, which headroom::optim::AdamW does not have; use torch::optim::AdamW for it");
    }
  }
  explicit AdamW(std::vector<torch::Tensor> parameters, const torch::optim::AdamWOptions& defaults = {},
                 MomentFormat format = MomentFormat::full)
      : AdamW({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults, format) {}

  MomentFormat format() const { return format_; }

  /// Updates every parameter that has a gradient.
  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      const at::AutoGradMode gradients(true);
      loss = closure();
    }
    updated_ = 0;
    continue_step();
    return loss;
  }

  /// Goes on with a step() that threw, at the parameter that it threw at: a parameter is updated as a whole or not at
  /// all.
  void continue_step() {
    size_t index = 0;
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      for (const torch::Tensor& parameter : param_groups_[group].params()) {
        if (index++ < updated_) continue;
        if (parameter.grad().defined()) update(group, parameter);
        ++updated_;
      }
    }
  }

  /// Updates a parameter of a group by its gradient. When it throws nothing has changed.
  void update(size_t group, const torch::Tensor& parameter) {
    const at::NoGradGuard guard;
    const torch::Tensor gradient = parameter.grad();
    require(!gradient.is_sparse(), "headroom.optim.sparse",
            "the gradient is sparse, expected a dense one; make the embedding dense or use torch::optim");
    const auto& options = options_of(group);
    const auto [first, second] = options.betas();

    // All that allocates comes first; what is changed in place comes last
    AdamWState& state = state_for(parameter);
    const int64_t step = state.step + 1;
    const Constants constants(parameter, {1 - options.lr() * options.weight_decay(), first, second,
                                          std::sqrt(1 - std::pow(second, step)), options.eps()});
    const auto& [decay, beta1, beta2, root, eps] = constants.values;
    const torch::Tensor average = loaded(state.average, parameter, true);
    const torch::Tensor square = loaded(state.square, parameter, false);
    const torch::Tensor denominator = at::empty_like(square);
    average.mul_(beta1).add_(gradient, 1 - first);
    square.mul_(beta2).addcmul_(gradient, gradient, 1 - second);
    at::sqrt_out(const_cast<torch::Tensor&>(denominator), square).div_(root).add_(eps);
    const StoredMoment new_average = stored(state.average, average, step, true);
    const StoredMoment new_square = stored(state.square, square, step, false);

    if (options.weight_decay() != 0) parameter.mul_(decay);
    parameter.addcdiv_(average, denominator, -options.lr() / (1 - std::pow(first, step)));
    state.average.copy_(new_average);
    state.square.copy_(new_square);
    state.step = step;
  }

  /// The state of a parameter: a new one, with moments of zero, where there is none.
  AdamWState& state_for(const torch::Tensor& parameter) {
    auto& known = state_[parameter.unsafeGetTensorImpl()];
    if (known == nullptr) {
      auto fresh = std::make_unique<AdamWState>();
      fresh->average = zero_moment(parameter, true);
      fresh->square = zero_moment(parameter, false);
      known = std::move(fresh);
    }
    return static_cast<AdamWState&>(*known);
  }

 private:
  /// Numbers as tensors of no dimension, made at once: an in-place operator makes its own where it is given a number.
  struct Constants {
    std::array<torch::Tensor, 5> values;
    Constants(const torch::Tensor& parameter, const std::array<double, 5>& numbers) {
      const HostTensors host;
      for (size_t i = 0; i < numbers.size(); ++i) {
        values[i] = at::scalar_tensor(numbers[i], at::TensorOptions(parameter.scalar_type()));
      }
    }
  };

  const torch::optim::AdamWOptions& options_of(size_t group) const {
    return static_cast<const torch::optim::AdamWOptions&>(param_groups_[group].options());
  }
  bool is_quantised(const torch::Tensor& parameter) const {
    return format_ == MomentFormat::eight_bit && parameter.numel() >= kSmallestEightBit;
  }
  const DynamicCode& code(const torch::Tensor& parameter, bool is_signed) {
    auto& known = codes_[is_signed];
    if (!known || known->values.device() != parameter.device()) known.emplace(is_signed, parameter);
    return *known;
  }

  StoredMoment zero_moment(const torch::Tensor& parameter, bool is_signed) {
    if (is_quantised(parameter)) {
      return quantise(at::zeros(parameter.sizes(), parameter.options().dtype(at::kFloat)), code(parameter, is_signed));
    }
    const auto type = format_ == MomentFormat::bf16 ? at::kBFloat16 : parameter.scalar_type();
    return {at::zeros(parameter.sizes(), parameter.options().dtype(type)), {}};
  }
  /// The moment to compute with: in place where it is stored as such.
  torch::Tensor loaded(const StoredMoment& moment, const torch::Tensor& parameter, bool is_signed) {
    if (moment.scales.defined()) return dequantise(moment, code(parameter, is_signed), parameter.sizes());
    if (moment.values.scalar_type() == parameter.scalar_type()) return moment.values;
    return moment.values.to(at::kFloat);
  }
  StoredMoment stored(const StoredMoment& before, const torch::Tensor& value, int64_t step, bool is_signed) {
    if (before.scales.defined()) return quantise(value, code(value, is_signed));
    if (before.values.is_same(value)) return before;
    return {round_to_bf16(value, step), {}};
  }

  MomentFormat format_;
  size_t updated_ = 0;  ///< parameters that the step under way is through with
  std::array<std::optional<DynamicCode>, 2> codes_;
};

}  // namespace headroom::inline v0::optim
