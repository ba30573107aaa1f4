#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/io/file_name.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/demucs_checkpoint.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/field.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/layout.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/yaml.hpp"

// A bag of demucs: NAME.yaml with the signatures of checkpoints that lie beside it and make stems together.
namespace headroom::inline v0::training {

/// Several checkpoints of demucs, and how much each counts.
struct DemucsBag {
  std::vector<std::filesystem::path> models;  ///< in the order of the file
  std::vector<Config> configs;                ///< of each of them
  std::vector<std::string> stems;             ///< that each of them makes
  std::vector<std::vector<double>> weights;   ///< of each model for each stem, 0 or more; a stem is Σ w·y / Σ w
};

/// Whether a path has the name of a bag: *.yaml or *.yml.
inline bool is_demucs_bag(const std::filesystem::path& path) {
  return path.extension() == ".yaml" || path.extension() == ".yml";
}

namespace detail {

inline constexpr auto kDemucsBag = "headroom.training.demucs_bag";

/// What the file says.
struct BagFile {
  std::vector<std::string> models;
  double segment = 0;  ///< seconds, for models that work on segments of any length; HTDemucs has its own
  std::vector<std::vector<double>> weights;  ///< of each model; none: 1 each

  static void describe(auto& self, auto&& field) {
    field("models", self.models, {.required = true, .file_names = true}, "signatures of the checkpoints");
    field("segment", self.segment, {.at_most = 1e6, .above = 0}, "seconds of a segment");
    field("weights", self.weights, {.at_least = 0, .at_most = 1e6}, "of each model");
  }
};

inline BagFile read_bag_file(Json document, const std::string& name) {
  for (const char* optional : {"weights", "segment"}) {
    if (document.contains(optional) && document[optional].is_null()) document.erase(optional);
  }
  BagFile bag;
  std::vector<Problem> problems;
  read_described(document, bag, "", problems);
  if (!bag.weights.empty() && bag.weights.size() != bag.models.size()) {
    reject(problems, "weights", document["weights"],
           "a list for each of the " + std::to_string(bag.models.size()) + " models");
  }
  require(problems.empty(), kDemucsBag, name, " is no bag of demucs' models:", to_string(problems),
          "\nA configuration of weights goes with --config");
  return bag;
}

/// The one checkpoint in a folder that has a signature: SIGNATURE.th or SIGNATURE-CHECKSUM.th.
inline std::filesystem::path find_checkpoint(const std::filesystem::path& folder, const std::string& signature,
                                             const std::string& bag) {
  std::vector<std::string> found;
  std::error_code failure;
  for (const std::filesystem::path& path : entries_of(folder, failure)) {
    const std::string stem = path.stem().string();
    if (path.extension() == ".th" && stem.substr(0, stem.find('-')) == signature) {
      found.push_back(path.filename().string());
    }
  }
  require(!failure && !found.empty(), kDemucsBag, bag, " has the model ", signature, ", but there is no ", signature,
          ".th or ", signature, "-….th in ", folder, "; put the checkpoint beside the bag");
  require(found.size() == 1, kDemucsBag, bag, " has the model ", signature, ", which could be any of ",
          core::word_list(found), " in ", folder, "; leave one of them there");
  return folder / found.front();
}

inline Config config_of(const std::filesystem::path& checkpoint) {
  const auto config = read_demucs_config(checkpoint);
  require(config.has_value(), kDemucsBag, checkpoint.string(), " is no checkpoint of demucs; get the file again");
  return parse_config(*config, checkpoint.string() + " (configuration)");
}

}  // namespace detail

/// Reads a bag of demucs and finds its checkpoints, without their weights. `segment` is checked and has no effect:
/// demucs leaves HTDemucs the segments that it was trained with, whatever a bag says.
/// Throws headroom.training.config_file, headroom.training.yaml, headroom.training.demucs for a model that is not here,
/// and headroom.training.demucs_bag: keys, numbers of weights, a stem without a model, a checkpoint that is missing or
/// there twice, models of other stems, channels or sample rates.
inline DemucsBag read_demucs_bag(const std::filesystem::path& path) {
  const std::string name = path.string();
  const auto file = detail::read_bag_file(
      parse_yaml(detail::read_text(path, "a bag of models", "a YAML file such as htdemucs_ft.yaml"), name), name);
  DemucsBag bag;
  for (const std::string& signature : file.models) {
    bag.models.push_back(detail::find_checkpoint(io::folder_of(path), signature, name));
    bag.configs.push_back(detail::config_of(bag.models.back()));
    const auto other = differences(bag.configs.front().audio, bag.configs.back().audio);
    require(other.empty(), detail::kDemucsBag, name, ": ", bag.models.back(), " has ",
            other.empty()
                ? ""
                : other.front().path + " " + other.front().after + ", the models before it " + other.front().before,
            "; expected models of the same stems, channels and sample rate");
  }
  bag.stems = bag.configs.front().audio.stems;
  bag.weights = file.weights;
  if (bag.weights.empty()) bag.weights.assign(bag.models.size(), std::vector<double>(bag.stems.size(), 1));
  for (const std::vector<double>& weights : bag.weights) {
    require(weights.size() == bag.stems.size(), detail::kDemucsBag, name, " has ", weights.size(),
            " weights for a model, expected one for each stem: ", core::word_list(bag.stems));
  }
  for (std::size_t n = 0; n < bag.stems.size(); ++n) {
    require(std::ranges::any_of(bag.weights, [&](const auto& weights) { return weights[n] > 0; }), detail::kDemucsBag,
            name, ": the weights of all models for ", bag.stems[n], " are 0; expected one above 0");
  }
  return bag;
}

}  // namespace headroom::inline v0::training
