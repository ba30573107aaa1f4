#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/dry_run/phase.hpp"
#include "headroom/memory/plan.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/trainer.hpp"

namespace headroom::inline v0::training {

/// Reads a device profile from a JSON file. Throws headroom.training.config_file, .json and, for a malformed profile,
/// headroom.training.device_profile.
inline DeviceProfile load_device_profile(const std::filesystem::path& path) {
  const std::string text = detail::read_text(path, "a device profile", "a JSON file, or the name of a known device");
  DeviceProfile profile;
  std::vector<Problem> problems;
  read_described(parse_json(text, path.string()), profile, "", problems);
  if (problems.empty() && profile.usable_bytes() <= 0) {
    problems.push_back({"total_bytes", "nothing is left of it after context_bytes and workspace_bytes"});
  }
  if (!problems.empty()) {
    std::ostringstream message;
    for (const Problem& problem : problems) message << "\n  " << problem.path << ": " << problem.text;
    fail("headroom.training.device_profile", path.string(), " is no device profile:", message.str(),
         "\nEvery key is described in docs/030_memory.md");
  }
  return profile;
}

/// A profile by name (device_profile) or, where `name` ends with .json, from a file.
inline DeviceProfile find_device_profile(const std::string& name) {
  return name.ends_with(".json") ? load_device_profile(name) : device_profile(name);
}

/// Examples without data.
struct ShapeSource {
  const Config& config;

  struct Example {
    torch::Tensor mixture, stems;
  };
  Example operator()(int64_t, int64_t count) const {
    const int64_t channels = config.audio.channels, samples = config.training.segment_length;
    const auto stems = static_cast<int64_t>(config.audio.stems.size());
    return {torch::empty({count, channels, samples}), torch::empty({count, stems, channels, samples})};
  }
};

namespace detail {

inline constexpr int64_t kReplayedSteps = 2;  // the first one makes the optimizer's state
/// Of the passes that gradients are accumulated over: the others need no more.
inline int64_t replayed_passes(const Config& config) {
  return std::min<int64_t>(config.training.gradient_accumulation_steps, 2);
}

/// Optimizer steps of the trainer and one segment of validation.
inline void dry_training(Config config) {
  config.training.gradient_accumulation_steps = replayed_passes(config);
  models::TimeFrequencyTransformer model(model_options(config));
  Trainer trainer(model, config, ShapeSource{config});
  for (int64_t step = 0; step < kReplayedSteps; ++step) trainer.step(config.training.learning_rate);
  const Phase phase("validation");
  const torch::NoGradGuard guard;
  model->eval();
  model->forward(ShapeSource{config}(0, 1).mixture);
}

}  // namespace detail

/// What training by a configuration will need on a device, the first step and validation included; `flops` are those of
/// one optimizer step. Throws headroom.memory.plan.budget.
inline Plan plan_training(const Config& config, const DeviceProfile& device, PlanOptions options = {}) {
  options.value = 1;  // losses and norms, which the trainer checks and reports
  Plan result = plan([&] { detail::dry_training(config); }, device, options);
  const double passes = static_cast<double>(config.training.gradient_accumulation_steps) /
                        static_cast<double>(detail::replayed_passes(config));
  result.flops = (result.flops - result.flops_by_phase["validation"]) / detail::kReplayedSteps * passes;
  return result;
}

}  // namespace headroom::inline v0::training
