#pragma once

#include <torch/types.h>

#include <any>
#include <concepts>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/json.hpp"
#include "headroom/weights/tensor_map.hpp"

namespace headroom::inline v0::training {

struct Config;
class Rules;

/// What is minimised: a number of the estimated and the true stems, both [B,N,C,S], and, for a function that takes it,
/// of the mixture [B,C,S].
class Loss {
 public:
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, Loss>) Loss(F&& f) {
    using Tensor = torch::Tensor;
    if constexpr (std::is_invocable_v<F&, const Tensor&, const Tensor&, const Tensor&>) {
      f_ = std::forward<F>(f);
    } else {
      f_ = [f = std::forward<F>(f)](const Tensor& estimate, const Tensor& stems, const Tensor&) mutable {
        return f(estimate, stems);
      };
    }
  }

  torch::Tensor operator()(const torch::Tensor& estimate, const torch::Tensor& stems,
                           const torch::Tensor& mixture) const {
    return f_(estimate, stems, mixture);
  }

 private:
  std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&)> f_;
};

/// A type of model, as the registry has it: all that the trainer, the planner, recommendations, the tools and saved
/// states know of it. `Options` is a described struct (described.hpp), whose members are keys of `model` in a
/// configuration. Only `make` has to be given.
template <class Options>
struct ModelEntry {
  /// The model, with parameters drawn from LibTorch's generator of random numbers.
  std::function<models::Separator(const Options&, const Config&)> make;
  /// What it is trained with; default: the loss of the section `loss`.
  std::function<Loss(const Options&, const Config&)> loss = {};
  /// How many blocks model.gradient_checkpointing decides about: those of all stacks, in the order in which they run.
  /// A model without blocks has no such key; one whose blocks keep nothing has 0 of them.
  std::function<int64_t(const Options&)> blocks = {};
  /// Bytes of the attention scores of one forward pass, if attention stored them. A model without attention has no
  /// model.attention.
  std::function<int64_t(const Options&, int64_t batch, int64_t samples)> stored_scores_bytes = {};
  /// Tells what is wrong with values that are fine one by one.
  std::function<void(const Options&, const Config&, Rules&)> check = {};
  /// Elements of the widest tensor for a batch of so many samples in all, about.
  std::function<double(const Options&, double samples)> widest_tensor = {};
  /// The size of the model and of a segment in a few words: "4 layers, width 96, 6 heads".
  std::function<std::string(const Options&, int64_t samples)> summary = {};
  /// What names and shapes of weights tell of the configuration that they belong to: an object whose keys name what a
  /// user has to look at when weights do not fit.
  std::function<Json(const weights::TensorMap&)> facts = {};
};

/// A ModelEntry whose Options are no longer known.
struct ModelType {
  std::any defaults;  ///< Options
  std::function<void(std::any&, Fields&)> describe;
  std::function<void(const std::any&, Fields&)> describe_constant;
  ModelEntry<std::any> entry;
};

/// All types of models by name, those of the library and those of the program.
std::map<std::string, ModelType>& model_types();

/// The type of this name. Throws headroom.training.model_type, with the known ones and the nearest of them.
const ModelType& find_model(const std::string& name);

namespace detail {

template <class Options, class Result, class... Arguments>
std::function<Result(const std::any&, Arguments...)> erased(std::function<Result(const Options&, Arguments...)> f) {
  if (!f) return {};
  return [f = std::move(f)](const std::any& options, Arguments... arguments) {
    return f(std::any_cast<const Options&>(options), std::forward<Arguments>(arguments)...);
  };
}

template <Described Options>
ModelType erased(ModelEntry<Options> entry) {
  return {
      .defaults = Options(),
      .describe = [](std::any& options,
                     Fields& fields) { Options::describe(std::any_cast<Options&>(options), fields); },
      .describe_constant = [](const std::any& options,
                              Fields& fields) { Options::describe(std::any_cast<const Options&>(options), fields); },
      .entry = {.make = erased(std::move(entry.make)),
                .loss = erased(std::move(entry.loss)),
                .blocks = erased(std::move(entry.blocks)),
                .stored_scores_bytes = erased(std::move(entry.stored_scores_bytes)),
                .check = erased(std::move(entry.check)),
                .widest_tensor = erased(std::move(entry.widest_tensor)),
                .summary = erased(std::move(entry.summary)),
                .facts = std::move(entry.facts)}};
}

}  // namespace detail

/// Makes a type of model known by the name that it has as `model.type`, for example at the start of a program:
///
///     register_model<Options>("conv_separator", {.make = [](const Options& options, const Config& config) {
///                               return ConvSeparator(options.width, config.audio.channels);
///                             }});
///
/// Throws headroom.training.model_registered where the name is taken.
template <Described Options>
void register_model(const std::string& name, ModelEntry<Options> entry) {
  require(entry.make != nullptr, "headroom.training.model_registered", "the model type ", name,
          " has no `make`; give a function that makes the model");
  const bool added = model_types().emplace(name, detail::erased(std::move(entry))).second;
  require(added, "headroom.training.model_registered", "there is a model type ", name,
          " already; register yours once and by another name");
}

}  // namespace headroom::inline v0::training
