#pragma once

#include <torch/nn/module.h>

#include <filesystem>
#include <ostream>

#include "headroom/memory/format.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/metrics_file.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/split.hpp"
#include "headroom/training/state.hpp"

/// Prints what a run is about to train, on which device and from how many examples at a time.
inline void print_start(std::ostream& out, const headroom::training::Config& config, const torch::nn::Module& model,
                        const torch::Device& device) {
  const auto& run = config.training;
  int64_t parameters = 0;
  for (const torch::Tensor& parameter : model.parameters()) parameters += parameter.numel();
  out << "model:    " << config.model.type() << ", " << parameters << " parameters";
  if (const auto& summary = config.model.entry().summary) {
    out << ", " << summary(config.model.options(), run.segment_length);
  }
  out << "\nbatch:    " << run.batch_size << " x " << run.gradient_accumulation_steps << " segments of "
      << run.segment_length
      << " samples, read ahead: " << headroom::format_bytes(headroom::training::read_ahead_bytes(config))
      << "\ndevice:   " << device << ", " << torch::get_num_threads() << " threads" << std::endl;
  if (const auto bytes = headroom::training::stored_scores_bytes(config)) {
    out << "stored attention scores would take " << headroom::format_bytes(*bytes) << " a step; "
        << (config.model.attention == "reference" ? "this backend stores them" : "none are stored") << std::endl;
  }
}

/// Writes summary.json, what a run has come to, into its folder. Throws as write_atomically does.
inline void write_summary(const std::filesystem::path& folder, const headroom::training::Summary& summary,
                          const headroom::training::Config& config) {
  headroom::training::Json json = {{"train_seconds", summary.seconds},
                                   {"steps", summary.steps},
                                   {"peak_bytes", summary.peak_bytes},
                                   {"best_metric", summary.best_metric},
                                   {"best_score", summary.best_score},
                                   {"losses", summary.epoch_losses},
                                   {"phases", headroom::training::phases_json(summary.phases)}};
  if (const auto bytes = headroom::training::stored_scores_bytes(config)) json["stored_scores_bytes"] = *bytes;
  headroom::training::write_atomically(folder / "summary.json", {json.dump(2) + "\n"});
}
