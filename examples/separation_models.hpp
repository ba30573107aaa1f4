#pragma once

#include <c10/core/Device.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/ensemble.hpp"
#include "headroom/audio/reader.hpp"
#include "headroom/audio/recording_level.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/core/combine.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/demucs_bag.hpp"
#include "headroom/training/load_model.hpp"
#include "separation_blend.hpp"

/// The models that separate, and what has to be the same for all of them.
struct SeparationModels {
  headroom::audio::Ensemble ensemble;  ///< for one recording, see ensemble_for
  int sample_rate = 0;                 ///< Hz
};

/// The models for one recording, which is read once more where some of them want it normalized.
inline headroom::audio::Ensemble ensemble_for(headroom::audio::AudioReader& recording, const SeparationModels& models) {
  headroom::audio::Ensemble ensemble = models.ensemble;
  std::optional<headroom::audio::Level> level;
  for (headroom::audio::EnsembleMember& member : ensemble.members) {
    if (!member.options.level) continue;
    if (!level) level = headroom::audio::level_of(recording);
    member.options.level = level;
  }
  return ensemble;
}

/// The names of models' files, a + between them.
inline std::string joint_name(const std::vector<std::filesystem::path>& files) {
  std::string name;
  for (const std::filesystem::path& file : files) name.append(name.empty() ? "" : "+").append(file.stem().string());
  return name;
}

/// What --ensemble takes: mean, median, min or max of the waveforms, and with :spectrum of the spectra.
inline std::map<std::string, headroom::core::Combination> combinations() {
  namespace core = headroom::core;
  std::map<std::string, core::Combination> named;
  for (const auto& [name, statistic] : {std::pair{"mean", core::Statistic::mean},
                                        {"median", core::Statistic::median},
                                        {"min", core::Statistic::min},
                                        {"max", core::Statistic::max}}) {
    named[name] = {statistic, core::Domain::waveform};
    named[std::string(name) + ":spectrum"] = {statistic, core::Domain::spectrum};
  }
  return named;
}

/// The module that a bag's models of one configuration run in, by turns; none before the first was added. It has the
/// weights of the one that ran last: reading those of the next takes a small part of a segment's time.
struct SharedModule {
  std::optional<headroom::training::LoadedModel> loaded = {};
  std::filesystem::path weights = {};
};

/// A model that is asked for.
struct ModelSource {
  headroom::training::ModelFiles files;
  std::uint64_t place = 0;                    ///< among all models, also those that are left out
  std::shared_ptr<SharedModule> shared = {};  ///< of a bag's models
  std::vector<double> weights =
      {};  ///< of a bag's model: how much each of its stems counts, 0 not at all; none: 1 each
};

/// Whether a model of a bag counts for one of `wanted`. Of a bag without any of these, a name may be misspelt: it is
/// whether the model counts for any stem.
inline bool counts_for(const std::vector<double>& weights, const std::vector<std::string>& stems,
                       const std::vector<std::string>& wanted) {
  const auto is_wanted = [&](const std::string& stem) { return std::ranges::find(wanted, stem) != wanted.end(); };
  const bool known = std::ranges::any_of(stems, is_wanted);
  for (std::size_t n = 0; n < stems.size(); ++n) {
    if (weights[n] > 0 && (!known || is_wanted(stems[n]))) return true;
  }
  return false;
}

/// Adds the models of a bag that count for one of `stems`, the first of which has this place among all models.
inline void add_bag(const headroom::training::DemucsBag& bag, const std::vector<std::string>& stems,
                    std::uint64_t place, std::vector<ModelSource>& sources) {
  std::map<std::string, std::shared_ptr<SharedModule>> modules;  // by configuration
  for (std::size_t m = 0; m < bag.models.size(); ++m, ++place) {
    if (!counts_for(bag.weights[m], bag.stems, stems)) continue;
    std::shared_ptr<SharedModule>& shared = modules[headroom::training::to_json(bag.configs[m])];
    if (!shared) shared = std::make_shared<SharedModule>();
    sources.push_back({{.weights = bag.models[m], .known = bag.configs[m]}, place, shared, bag.weights[m]});
  }
}

/// Weights and their configurations: none, one for all, or one each. A bag of demucs, which has its own, becomes its
/// models, those that count for one of `stems` (none: for any). Throws headroom.separate.configs and like
/// read_demucs_bag.
inline std::vector<ModelSource> model_sources(const std::vector<std::filesystem::path>& weights,
                                              const std::vector<std::filesystem::path>& configs,
                                              const std::vector<std::string>& stems) {
  namespace training = headroom::training;
  const auto bags = static_cast<std::size_t>(std::ranges::count_if(weights, training::is_demucs_bag));
  const std::size_t others = weights.size() - bags;
  headroom::require(configs.size() <= 1 || configs.size() == others, "headroom.separate.configs", "got ",
                    configs.size(), " configurations for ", others, " models", bags > 0 ? " that are no bags" : "",
                    "; give one --config for all of them, or one each in the same order");
  headroom::require(configs.empty() || others > 0, "headroom.separate.configs", "got the configuration ",
                    configs.empty() ? "" : configs.front(),
                    " for a bag, whose models have theirs in them; leave it out");
  std::vector<ModelSource> sources;
  std::uint64_t place = 0;
  auto config = configs.begin();
  for (const std::filesystem::path& path : weights) {
    if (training::is_demucs_bag(path)) {
      const training::DemucsBag bag = training::read_demucs_bag(path);
      add_bag(bag, stems, place, sources);
      place += bag.models.size();
      continue;
    }
    sources.push_back({{path, configs.empty() ? "" : *config}, place++});
    if (configs.size() > 1) ++config;
  }
  return sources;
}

/// A model of the stems with these places among those that `model` makes.
inline headroom::audio::SegmentModel with_stems(headroom::audio::SegmentModel model, std::vector<std::int64_t> places) {
  return [model = std::move(model), places = std::move(places)](const torch::Tensor& segments) {
    const torch::Tensor stems = model(segments);  // [B,N,C,S]
    return stems.index_select(1, torch::tensor(places, stems.options().dtype(torch::kLong)));
  };
}

/// Leaves out the stems for which a model does not count, and weighs the others.
inline void weigh(headroom::audio::EnsembleMember& member, const std::vector<double>& weights) {
  std::vector<std::int64_t> places;
  std::vector<std::string> stems;
  for (std::size_t n = 0; n < weights.size(); ++n) {
    if (weights[n] == 0) continue;
    places.push_back(static_cast<std::int64_t>(n));
    stems.push_back(member.stems[n]);
    member.weights.push_back(weights[n]);
  }
  if (std::ranges::all_of(member.weights, [](double weight) { return weight == 1; })) member.weights.clear();
  if (stems.size() < member.stems.size()) member.model = with_stems(std::move(member.model), std::move(places));
  member.options.stems = static_cast<std::int64_t>(stems.size());
  member.stems = std::move(stems);
}

/// Runs a model in the module that it shares, which gets its weights where it has those of another one.
inline headroom::audio::SegmentModel run_by_turns(const std::shared_ptr<SharedModule>& shared,
                                                  const std::filesystem::path& weights) {
  return [shared, weights](const torch::Tensor& segments) {
    auto& [config, model] = *shared->loaded;
    if (shared->weights != weights) headroom::training::load_weights(model, config, weights);
    shared->weights = weights;
    return model(segments);
  };
}

/// Adds a model to those that are there, and returns what its configuration asks for and does not get. Throws
/// headroom.separate.models where it does not fit to them.
inline std::vector<std::string> add_model(const ModelSource& source, const BlendChoice& blend, c10::Device device,
                                          SeparationModels& models) {
  std::vector<std::string> notices;
  const auto module = source.shared ? source.shared : std::make_shared<SharedModule>();
  if (!module->loaded) {
    *module = {headroom::training::load_model(source.files, &notices), source.files.weights};
    module->loaded->model->to(device);
  }
  const headroom::training::Config& config = module->loaded->config;
  const auto rate = static_cast<int>(config.audio.sample_rate);
  headroom::require(models.sample_rate == 0 || models.sample_rate == rate, "headroom.separate.models",
                    source.files.weights, " is a model for ", rate, " Hz, the one before it for ", models.sample_rate,
                    "; separate with each and combine the results");
  models.sample_rate = rate;
  const headroom::audio::SeparatorOptions options{
      .segments = chosen_segments(blend, config.inference_segment(), config.inference.overlap),
      .batch = blend.batch.value_or(config.inference.batch),
      .channels = config.audio.channels,
      .stems = static_cast<std::int64_t>(config.audio.stems.size()),
      .test_time = {.shifts = blend.shifts,
                    .max_shift = rate / 2,
                    .seed = source.place,  // other silences for each model, the same whichever are left out
                    .augment = blend.augment},
      .bf16 = blend.bf16,
      .device = device,
      .level = config.inference.normalize ? std::optional(headroom::audio::Level{})  // of the recording: ensemble_for
                                          : std::nullopt};
  headroom::audio::EnsembleMember member{run_by_turns(module, source.files.weights), options, config.audio.stems};
  if (!source.weights.empty()) weigh(member, source.weights);
  models.ensemble.members.push_back(std::move(member));
  return notices;
}
