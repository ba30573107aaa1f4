#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/optim/adamw_state.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::optim {

/// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a choice of how its two moments are stored. With
/// MomentFormat::full it gives the bits of torch::optim::AdamW for float and double parameters. Bytes of state for each
/// element of a float, bfloat16 or half parameter: full 8, bf16 4, 8bit 2.03. The arithmetic is in float, in double for
/// double parameters, constants included, whatever the types of parameters and formats; a parameter of 16 bits is
/// rounded once a step. A parameter at a time has its moments in float while it is updated.
///
/// With 8 bits no element moves further in a step than exact moments could have moved it.
///
/// torch::save and torch::load keep the moments, the step counts and the options of every group.
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
    const torch::Tensor given = parameter.grad();
    require(!given.is_sparse(), "headroom.optim.sparse",
            "the gradient is sparse, expected a dense one; make the embedding dense or use torch::optim");
    const auto& options = options_of(group);
    const auto [first, second] = options.betas();

    // All that allocates comes first; what is changed in place comes last
    AdamWState& state = state_for(parameter);
    const int64_t step = state.step + 1;
    const auto type = computed_type(parameter);
    const Constants constants(type, {1 - options.lr() * options.weight_decay(), first, second,
                                     std::sqrt(1 - std::pow(second, step)), options.eps()});
    const auto& [decay, beta1, beta2, root, eps] = constants.values;
    const torch::Tensor exact = parameter.to(type), gradient = given.to(type);
    const torch::Tensor average = loaded(state.average, parameter, true);
    const torch::Tensor square = loaded(state.square, parameter, false);
    const torch::Tensor denominator = at::empty_like(square);
    average.mul_(beta1).add_(gradient, 1 - first);
    square.mul_(beta2).addcmul_(gradient, gradient, 1 - second);
    at::sqrt_out(const_cast<torch::Tensor&>(denominator), square).div_(root).add_(eps);
    const StoredMoment new_average = stored(state.average, average, step, true);
    const StoredMoment new_square = stored(state.square, square, step, false);

    if (options.weight_decay() != 0) exact.mul_(decay);
    const double rate = options.lr() / (1 - std::pow(first, step));
    if (state.average.scales.defined()) {
      const double most = detail::largest_ratio(first, second, step) * std::sqrt(1 - std::pow(second, step));
      exact.add_(average.div_(denominator).clamp_(-most, most), -rate);
    } else {
      exact.addcdiv_(average, denominator, -rate);
    }
    if (!exact.is_same(parameter)) parameter.copy_(exact);
    state.average.copy_(new_average);
    state.square.copy_(new_square);
    state.step = step;
  }

  void save(torch::serialize::OutputArchive& archive) const override {
    archive.write("headroom_adamw", c10::IValue(kArchiveVersion));
    archive.write("format", c10::IValue(std::string(kMomentFormatNames[static_cast<size_t>(format_)])));
    size_t index = 0;
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      torch::serialize::OutputArchive part(archive.compilation_unit());
      options_of(group).serialize(part);
      part.write("parameters", c10::IValue(static_cast<int64_t>(param_groups_[group].params().size())));
      archive.write("group" + std::to_string(group), part);
      for (const torch::Tensor& parameter : param_groups_[group].params()) {
        const auto known = state_.find(parameter.unsafeGetTensorImpl());
        torch::serialize::OutputArchive state(archive.compilation_unit());
        if (known != state_.end()) {
          state.write("sizes", c10::IValue(parameter.sizes().vec()));
          known->second->serialize(state);
        }
        archive.write("parameter" + std::to_string(index++), state);
      }
    }
    archive.write("groups", c10::IValue(static_cast<int64_t>(param_groups_.size())));
  }

  /// Of an optimizer with as many parameters of the same shapes and types in as many groups, in the same format; else
  /// it throws headroom.optim.state and changes nothing.
  void load(torch::serialize::InputArchive& archive) override {
    c10::IValue found;
    const bool is_ours = archive.try_read("headroom_adamw", found) && found.isInt() && found.toInt() == kArchiveVersion;
    check_state(is_ours, "the archive holds no state of this version of headroom::optim::AdamW",
                "; load what torch::save made of one");
    archive.read("format", found);
    const std::string_view format = kMomentFormatNames[static_cast<size_t>(format_)];
    check_state(found.toStringRef() == format, "the saved moments are stored in the format ", found.toStringRef(),
                ", these in ", format, "; make the optimizer with the format of the saved one");
    archive.read("groups", found);
    check_state(found.toInt() == static_cast<int64_t>(param_groups_.size()), "the saved optimizer has ", found.toInt(),
                " groups of parameters, this one ", param_groups_.size(), "; make the same groups");

    std::vector<torch::optim::AdamWOptions> options(param_groups_.size());
    std::vector<std::pair<void*, std::unique_ptr<AdamWState>>> states;
    for (size_t group = 0, index = 0; group < param_groups_.size(); ++group) {
      const auto& parameters = param_groups_[group].params();
      torch::serialize::InputArchive part;
      archive.read("group" + std::to_string(group), part);
      options[group].serialize(part);
      part.read("parameters", found);
      check_state(found.toInt() == static_cast<int64_t>(parameters.size()), "group ", group,
                  " of the saved optimizer has ", found.toInt(), " parameters, of this one ", parameters.size(),
                  "; make the same groups");
      for (const torch::Tensor& parameter : parameters) {
        torch::serialize::InputArchive state;
        archive.read("parameter" + std::to_string(index), state);
        if (state.try_read("sizes", found)) {
          check_state(parameter.sizes() == found.toIntVector(), "parameter ", index, " is ", parameter.sizes(),
                      ", the saved one ", at::IntArrayRef(found.toIntVector()),
                      "; load it into the optimizer of the same model");
          states.emplace_back(parameter.unsafeGetTensorImpl(), loaded_state(state, parameter, index));
        }
        ++index;
      }
    }
    for (size_t group = 0; group < options.size(); ++group) {
      static_cast<torch::optim::AdamWOptions&>(param_groups_[group].options()) = options[group];
    }
    state_.clear();
    for (auto& [parameter, state] : states) state_[parameter] = std::move(state);
  }

  /// The state of a parameter: a new one, with moments of zero, where there is none.
  AdamWState& state_for(const torch::Tensor& parameter) {
    auto& known = state_[parameter.unsafeGetTensorImpl()];
    if (known == nullptr) known = zero_state(parameter);
    return static_cast<AdamWState&>(*known);
  }

 private:
  /// Numbers as tensors of no dimension, made at once: an in-place operator makes its own where it is given a number.
  struct Constants {
    std::array<torch::Tensor, 5> values;
    Constants(torch::ScalarType type, const std::array<double, 5>& numbers) {
      const HostTensors host;
      for (size_t i = 0; i < numbers.size(); ++i) values[i] = at::scalar_tensor(numbers[i], at::TensorOptions(type));
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

  /// The type to compute in: 16 bits hold neither 0.999 nor 1e-8.
  static torch::ScalarType computed_type(const torch::Tensor& parameter) {
    return parameter.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }
  StoredMoment zero_moment(const torch::Tensor& parameter, bool is_signed) {
    const auto zeros = [&](torch::ScalarType type) {
      return at::zeros(parameter.sizes(), parameter.options().dtype(type).requires_grad(false));
    };
    if (is_quantised(parameter)) return quantise(zeros(at::kFloat), code(parameter, is_signed));
    return {zeros(format_ == MomentFormat::bf16 ? at::kBFloat16 : computed_type(parameter)), {}};
  }
  std::unique_ptr<AdamWState> zero_state(const torch::Tensor& parameter) {
    auto state = std::make_unique<AdamWState>();
    state->average = zero_moment(parameter, true);
    state->square = zero_moment(parameter, false);
    return state;
  }
  /// The moment to compute with: in place where it is stored as such.
  torch::Tensor loaded(const StoredMoment& moment, const torch::Tensor& parameter, bool is_signed) {
    const auto type = computed_type(parameter);
    if (!moment.scales.defined()) return moment.values.to(type);
    return dequantise(moment, code(parameter, is_signed), parameter.sizes()).to(type);
  }
  StoredMoment stored(const StoredMoment& before, const torch::Tensor& value, int64_t step, bool is_signed) {
    if (before.values.is_same(value)) return before;
    const torch::Tensor x = value.to(at::kFloat);
    return before.scales.defined() ? quantise(x, code(x, is_signed), rounding_position(step))
                                   : StoredMoment{round_to_bf16(x, step), {}};
  }

  static constexpr int64_t kArchiveVersion = 1;

  static void check_state(bool holds, const auto&... what) { require(holds, "headroom.optim.state", what...); }

  /// What an archive holds for a parameter, on its device.
  std::unique_ptr<AdamWState> loaded_state(torch::serialize::InputArchive& archive, const torch::Tensor& parameter,
                                           size_t index) {
    AdamWState saved;
    saved.serialize(archive);
    auto state = zero_state(parameter);
    const auto take = [&](const torch::Tensor& target, const torch::Tensor& source) {
      const bool fits =
          target.defined() == source.defined() &&
          (!target.defined() || (target.sizes() == source.sizes() && target.scalar_type() == source.scalar_type()));
      check_state(fits, "parameter ", index, " is ", parameter.scalar_type(),
                  ", its saved moments are those of another type; load them into the optimizer of the same model");
      if (target.defined()) target.copy_(source);
    };
    take(state->average.values, saved.average.values);
    take(state->average.scales, saved.average.scales);
    take(state->square.values, saved.square.values);
    take(state->square.scales, saved.square.scales);
    state->step = saved.step;
    return state;
  }

  MomentFormat format_;
  size_t updated_ = 0;  ///< parameters that the step under way is through with
  std::array<std::optional<DynamicCode>, 2> codes_;
};

}  // namespace headroom::inline v0::optim
