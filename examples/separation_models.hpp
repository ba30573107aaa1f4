#pragma once

#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
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
#include "headroom/training/load_model.hpp"
#include "separation_blend.hpp"

/// The models that separate, and what has to be the same for all of them.
struct SeparationModels {
  headroom::audio::Ensemble ensemble;
  int sample_rate = 0;           ///< Hz
  std::string name;              ///< of the models' files, a + between them
  std::vector<bool> normalized;  ///< for each model, whether it gets recordings at audio::Level's mean and deviation
};

/// The models for one recording, which is read once more where some of them want it normalized.
inline headroom::audio::Ensemble ensemble_for(headroom::audio::AudioReader& recording, const SeparationModels& models) {
  headroom::audio::Ensemble ensemble = models.ensemble;
  std::optional<headroom::audio::Level> level;
  for (std::size_t i = 0; i < models.normalized.size(); ++i) {
    if (!models.normalized[i]) continue;
    if (!level) level = headroom::audio::level_of(recording);
    ensemble.members[i].options.level = level;
  }
  return ensemble;
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

/// Weights and their configurations: none, one for all, or one each. Throws headroom.separate.configs.
inline std::vector<headroom::training::ModelFiles> model_files(const std::vector<std::filesystem::path>& weights,
                                                               const std::vector<std::filesystem::path>& configs) {
  headroom::require(configs.size() <= 1 || configs.size() == weights.size(), "headroom.separate.configs", "got ",
                    configs.size(), " configurations for ", weights.size(),
                    " models; give one --config for all of them, or one each in the same order");
  std::vector<headroom::training::ModelFiles> files;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    files.push_back({weights[i], configs.empty() ? std::filesystem::path() : configs[configs.size() > 1 ? i : 0]});
  }
  return files;
}

/// Adds a model to those that are there, and returns what its configuration asks for and does not get. Throws
/// headroom.separate.models where it does not fit to them.
inline std::vector<std::string> add_model(const headroom::training::ModelFiles& files, const BlendChoice& blend,
                                          c10::Device device, SeparationModels& models) {
  std::vector<std::string> notices;
  auto [config, model] = headroom::training::load_model(files, &notices);
  model->to(device);
  const auto rate = static_cast<int>(config.audio.sample_rate);
  headroom::require(models.sample_rate == 0 || models.sample_rate == rate, "headroom.separate.models", files.weights,
                    " is a model for ", rate, " Hz, the one before it for ", models.sample_rate,
                    "; separate with each and combine the results");
  models.sample_rate = rate;
  models.name.append(models.name.empty() ? "" : "+").append(files.weights.stem().string());
  const headroom::audio::SeparatorOptions options{
      .segments = chosen_segments(blend, config.inference_segment(), config.inference.overlap),
      .batch = blend.batch.value_or(config.inference.batch),
      .channels = config.audio.channels,
      .stems = static_cast<std::int64_t>(config.audio.stems.size()),
      .test_time = {.shifts = blend.shifts, .max_shift = rate / 2, .augment = blend.augment},
      .bf16 = blend.bf16,
      .device = device};
  models.ensemble.members.push_back({headroom::audio::segment_model(model), options, config.audio.stems});
  models.normalized.push_back(config.inference.normalize);
  return notices;
}
