#pragma once

#include <torch/types.h>

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/demucs_checkpoint.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/state.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/file_map.hpp"
#include "headroom/weights/load.hpp"
#include "headroom/weights/safetensors.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "headroom/weights/tensors.hpp"

namespace headroom::inline v0::training {

/// Where a model comes from.
struct ModelFiles {
  /// A saved state or a safetensors file of train or a checkpoint of demucs, which have their configuration in them;
  /// with `config`, any file of weights.
  std::filesystem::path weights;
  std::filesystem::path config = {};  ///< of ours or published, see load_config
  /// Of a saved state with averaged weights take these; false: those that training goes on from, which no other file
  /// has.
  bool averaged = true;
  std::optional<Config> known = {};  ///< the configuration itself, where it was read already
};

/// A trained model and its configuration.
struct LoadedModel {
  Config config;
  models::Separator model;
};

/// Reads a model for inference: it is in evaluation mode and needs no gradients. `notices` as in load_config. Throws
/// like load_config, load_weights, load_state and read_demucs_config, headroom.training.no_config for weights without a
/// configuration, and headroom.training.raw_weights where weights that are not averaged are asked of another file than
/// a saved state.
HEADROOM_TRAINING LoadedModel load_model(const ModelFiles& files, std::vector<std::string>* notices = nullptr);
/// The same from one file that tells its configuration, such as a saved state.
inline LoadedModel load_model(const std::filesystem::path& weights) { return load_model(ModelFiles{weights}); }

/// Copies weights of any format into the model of a configuration, see weights::load_weights. Throws
/// headroom.training.weights, which says where the weights tell another configuration, and what weights::load_tensors
/// throws.
HEADROOM_TRAINING weights::LoadReport load_weights(const models::Separator& model, const Config& config,
                                                   const std::filesystem::path& path,
                                                   const weights::LoadOptions& options = {});

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

/// What the names and shapes of weights tell otherwise than those of the model, a line each.
inline std::string other_facts(const Config& config, const TensorMap& weights, const TensorMap& model,
                               const std::vector<std::string>& prefixes) {
  if (!config.model.entry().facts) return "";
  TensorMap plain;
  for (const auto& [name, tensor] : weights) plain.emplace(weights::without_prefixes(name, prefixes), tensor);
  const Json found = config.model.entry().facts(plain), expected = config.model.entry().facts(model);
  std::string text;
  for (const auto& [key, value] : expected.items()) {
    if (value != found[key])
      text += "\n  " + key + ": the weights have " + found[key].dump() + ", the configuration " + value.dump();
  }
  return text;
}

/// The configuration in the metadata of a safetensors file; none where it is another file.
inline std::optional<std::string> config_within(const std::filesystem::path& path) {
  const weights::FileMap map(path);
  const weights::Source source{map.bytes(), path.string()};
  if (!weights::is_safetensors(source.bytes)) return std::nullopt;
  const auto metadata = weights::read_safetensors(source).metadata;
  const auto found = metadata.find(kConfigKey);
  require(found != metadata.end(), "headroom.training.no_config", path.string(),
          " has weights and no configuration; give the one that was published with it as well, --config FILE");
  return found->second;
}

/// Copies tensors into the model of a configuration, as load_weights does with those of a file.
inline weights::LoadReport take_weights(const LoadedModel& loaded, const TensorMap& tensors,
                                        const std::filesystem::path& path, const weights::LoadOptions& options) {
  const TensorMap targets = tensors_of(*loaded.model);
  weights::Matches matches = weights::match_tensors(tensors, targets, weights::rules_of(*loaded.model, options));
  const weights::LoadReport& report = matches.report;
  require(report.is_enough(options), "headroom.training.weights", path.string(), " does not fit the ",
          loaded.config.model.type(), " of the configuration: ", weights::summary_of(report),
          "; give the configuration that belongs to the weights",
          report.may_fit_in_part(options) ? ", or --allow-partial to train with what fits" : "",
          other_facts(loaded.config, tensors, targets, options.prefixes), to_string(report));
  matches.copy();
  return std::move(matches.report);
}

}  // namespace detail

HEADROOM_TRAINING weights::LoadReport load_weights(const models::Separator& model, const Config& config,
                                                   const std::filesystem::path& path,
                                                   const weights::LoadOptions& options) {
  return detail::take_weights({config, model}, weights::load_tensors(path, options.key), path, options);
}

HEADROOM_TRAINING LoadedModel load_model(const ModelFiles& files, std::vector<std::string>* notices) {
  const std::filesystem::path& path = files.weights;
  std::optional<std::string> within;
  std::optional<TrainingState> state;
  if (is_saved_state(path)) {
    state = load_state(path);
  } else if (files.config.empty() && !files.known) {
    within = detail::config_within(path);
    if (!within) within = read_demucs_config(path);
    if (!within) state = load_state(path);  // which says what is wrong
  }
  require(files.averaged || state, "headroom.training.raw_weights", path.string(),
          " is no saved state: it has one set of weights, which are averaged where training.ema_decay says so; give "
          "last.pt or best.pt of the run, or do without --raw-weights");
  const Config config = files.known ? *files.known
                        : !files.config.empty()
                            ? load_config(files.config, notices)
                            : parse_config(state ? state->config : *within, path.string() + " (configuration)");
  LoadedModel loaded{config, make_model(config)};
  const TensorMap tensors = !state           ? weights::load_tensors(path)
                            : files.averaged ? exported_tensors(*state)
                                             : state->model;
  detail::take_weights(loaded, tensors, path, {});
  loaded.model->eval();
  for (torch::Tensor& parameter : loaded.model->parameters()) parameter.requires_grad_(false);
  return loaded;
}
#endif

}  // namespace headroom::inline v0::training
