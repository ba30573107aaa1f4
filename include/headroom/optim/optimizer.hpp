#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/parameter_state.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::optim {

/// What the optimizers here have in common: they update one parameter after the other, each as a whole or not at all,
/// and store what they know of it in a format. Groups of parameters and their options are LibTorch's.
///
/// torch::save and torch::load keep the moments, the step counts and the options of every group. Sparse gradients are
/// refused (headroom.optim.sparse).
class Optimizer : public torch::optim::Optimizer {
 public:
  /// As in messages and archives.
  virtual std::string name() const = 0;

  MomentFormat format() const { return moments_.format(); }

  /// Updates every parameter that has a gradient.
  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss;
    if (closure) {
      const at::AutoGradMode gradients(true);
      loss = closure();
    }
    seen_ = updated_ = 0;
    decided_ = false;
    continue_step();
    return loss;
  }

  /// Goes on with a step() that threw, at the parameter that it threw at.
  void continue_step() {
    if (needs_all_gradients() && !decided_) {
      if (seen_ == 0) begin_step();
      each_after(seen_, [&](size_t group, const torch::Tensor& parameter) { see(group, parameter); });
      decide();
      decided_ = true;
    }
    each_after(updated_, [&](size_t group, const torch::Tensor& parameter) { update(group, parameter); });
  }

  /// Updates a parameter of a group by its gradient. When it throws nothing has changed.
  virtual void update(size_t group, const torch::Tensor& parameter) = 0;

  /// Whether a step looks at all gradients before it updates the first parameter; then update() alone is no step.
  virtual bool needs_all_gradients() const { return false; }

  /// What the optimizer knows of a parameter that it has not updated yet.
  virtual std::unique_ptr<ParameterState> zero_state(const torch::Tensor& parameter) = 0;

  /// The state of a parameter: that of zero_state() where there is none.
  ParameterState& state_for(const torch::Tensor& parameter) {
    auto& known = state_[parameter.unsafeGetTensorImpl()];
    if (known == nullptr) known = zero_state(parameter);
    return static_cast<ParameterState&>(*known);
  }
  bool knows(const torch::Tensor& parameter) const { return state_.count(parameter.unsafeGetTensorImpl()) > 0; }

  /// What it knows of all parameters together, by name.
  virtual std::map<std::string, double*> numbers() { return {}; }

  void save(torch::serialize::OutputArchive& archive) const override;

  /// Of an optimizer with as many parameters of the same shapes and types in as many groups, in the same format; else
  /// it throws headroom.optim.state and changes nothing.
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
            std::unique_ptr<torch::optim::OptimizerOptions> defaults, MomentFormat format)
      : torch::optim::Optimizer(groups, std::move(defaults)), moments_(format) {}

  /// Of one that needs all gradients: begins a step, sees a parameter with its gradient, as a whole or not at all, and
  /// decides after the last one; this allocates nothing.
  virtual void begin_step() {}
  virtual void see(size_t /*group*/, const torch::Tensor& /*parameter*/) {}
  virtual void decide() {}

  template <class Options>
  const Options& options_of(size_t group) const {
    return static_cast<const Options&>(param_groups_[group].options());
  }

  /// The gradient of a parameter in the type to compute in.
  static torch::Tensor gradient_of(const torch::Tensor& parameter) {
    require(!parameter.grad().is_sparse(), "headroom.optim.sparse",
            "the gradient is sparse, expected a dense one; make the embedding dense or use torch::optim");
    return parameter.grad().to(computed_type(parameter));
  }

  /// Numbers as tensors of no dimension, made at once: an in-place operator makes its own where it is given a number.
  template <size_t N>
  static std::array<torch::Tensor, N> constants(torch::ScalarType type, const double (&numbers)[N]) {
    const HostTensors host;
    std::array<torch::Tensor, N> values;
    for (size_t i = 0; i < N; ++i) values[i] = at::scalar_tensor(numbers[i], at::TensorOptions(type));
    return values;
  }

  MomentStore moments_;

 private:
  template <class F>
  void each_after(size_t& done, F&& f) {
    size_t index = 0;
    for (size_t group = 0; group < param_groups_.size(); ++group) {
      for (const torch::Tensor& parameter : param_groups_[group].params()) {
        if (index++ < done) continue;
        if (parameter.grad().defined()) f(group, parameter);
        ++done;
      }
    }
  }

  static void check_state(bool holds, const auto&... what) { require(holds, "headroom.optim.state", what...); }

  /// Names of an archive have no dots.
  static std::string archived(std::string tensor) {
    std::replace(tensor.begin(), tensor.end(), '.', '_');
    return tensor;
  }
  std::string title() const { return name() + " 2"; }  // of the layout of archives

  std::unique_ptr<ParameterState> loaded_state(torch::serialize::InputArchive& archive, const torch::Tensor& parameter,
                                               size_t index);

  size_t seen_ = 0, updated_ = 0;  ///< parameters that the step under way is through with
  bool decided_ = false;
};

inline void Optimizer::save(torch::serialize::OutputArchive& archive) const {
  archive.write("headroom_optimizer", c10::IValue(title()));
  archive.write("format", c10::IValue(std::string(kMomentFormatNames[static_cast<size_t>(format())])));
  for (const auto& [name, number] : const_cast<Optimizer&>(*this).numbers()) archive.write(name, c10::IValue(*number));
  size_t index = 0;
  for (size_t group = 0; group < param_groups_.size(); ++group) {
    torch::serialize::OutputArchive part(archive.compilation_unit());
    param_groups_[group].options().serialize(part);
    part.write("parameters", c10::IValue(static_cast<int64_t>(param_groups_[group].params().size())));
    archive.write("group" + std::to_string(group), part);
    for (const torch::Tensor& parameter : param_groups_[group].params()) {
      const auto known = state_.find(parameter.unsafeGetTensorImpl());
      torch::serialize::OutputArchive state(archive.compilation_unit());
      if (known != state_.end()) {
        const auto& values = static_cast<const ParameterState&>(*known->second);
        state.write("sizes", c10::IValue(parameter.sizes().vec()));
        state.write("step", c10::IValue(values.step));
        values.each_tensor(
            [&](const std::string& name, const torch::Tensor& tensor) { state.write(archived(name), tensor); });
      }
      archive.write("parameter" + std::to_string(index++), state);
    }
  }
  archive.write("groups", c10::IValue(static_cast<int64_t>(param_groups_.size())));
}

/// What an archive holds for a parameter, on its device.
inline std::unique_ptr<ParameterState> Optimizer::loaded_state(torch::serialize::InputArchive& archive,
                                                               const torch::Tensor& parameter, size_t index) {
  auto state = zero_state(parameter);
  size_t keys = 2;  // its sizes and its step
  state->each_tensor([&](const std::string& name, const torch::Tensor& target) {
    ++keys;
    torch::Tensor saved;
    const bool fits = archive.try_read(archived(name), saved) && target.sizes() == saved.sizes() &&
                      target.scalar_type() == saved.scalar_type();
    check_state(fits, "parameter ", index, " is ", parameter.scalar_type(),
                ", its saved moments are those of another type; load them into the optimizer of the same model");
    torch::Tensor(target).copy_(saved);
  });
  check_state(archive.keys().size() == keys, "of parameter ", index, " there are ", archive.keys().size() - 2,
              " saved moments, this optimizer keeps ", keys - 2, "; make it with the options of the saved one");
  c10::IValue step;
  archive.read("step", step);
  state->step = step.toInt();
  return state;
}

inline void Optimizer::load(torch::serialize::InputArchive& archive) {
  c10::IValue found;
  const bool is_ours =
      archive.try_read("headroom_optimizer", found) && found.isString() && found.toStringRef() == title();
  check_state(is_ours, "the archive holds no state of this version of headroom::optim::", name(),
              "; load what torch::save made of one");
  archive.read("format", found);
  const std::string_view format = kMomentFormatNames[static_cast<size_t>(this->format())];
  check_state(found.toStringRef() == format, "the saved moments are stored in the format ", found.toStringRef(),
              ", these in ", format, "; make the optimizer with the format of the saved one");
  archive.read("groups", found);
  check_state(found.toInt() == static_cast<int64_t>(param_groups_.size()), "the saved optimizer has ", found.toInt(),
              " groups of parameters, this one ", param_groups_.size(), "; make the same groups");

  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> options;
  std::vector<std::pair<void*, std::unique_ptr<ParameterState>>> states;
  for (size_t group = 0, index = 0; group < param_groups_.size(); ++group) {
    const auto& parameters = param_groups_[group].params();
    torch::serialize::InputArchive part;
    archive.read("group" + std::to_string(group), part);
    options.push_back(param_groups_[group].options().clone());
    options.back()->serialize(part);
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
  for (const auto& [name, number] : numbers()) {
    archive.read(name, found);
    *number = found.toDouble();
  }
  for (size_t group = 0; group < options.size(); ++group) param_groups_[group].set_options(std::move(options[group]));
  state_.clear();
  for (auto& [parameter, state] : states) state_[parameter] = std::move(state);
}

}  // namespace headroom::inline v0::optim
