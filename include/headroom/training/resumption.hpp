#pragma once

#include <string>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

/// Throws headroom.training.state.config when a difference between the configuration of a saved state, called `what`,
/// and another one makes it another model.
inline void check_same_model(const std::vector<Difference>& changes, const std::string& what) {
  std::string bound;
  for (const Difference& change : changes) {
    if (change.bound) bound += "\n  " + describe(change);
  }
  require(bound.empty(), "headroom.training.state.config", what,
          " was trained as another model; go on with the configuration saved in it, or start anew", bound);
}

/// Losses and scores are only compared, or added up, with those of before when they measure the same.
inline void forget_incomparable(const std::vector<Difference>& changes, const TrainingConfig& training,
                                TrainingState& state) {
  bool losses = false, scores = false;
  for (const auto& [path, before, after, bound] : changes) {
    const bool segments = path == "training.segment_length";
    losses |= segments || path.starts_with("loss.") || (path.starts_with("data.") && path != "data.path");
    scores |= segments || path == "training.validation_segments" || path == "training.validation" ||
              (training.validation == "tracks" && path.starts_with("inference."));
  }
  if (losses) {
    state.unfinished_steps = 0;
    state.unfinished_skipped = 0;
    state.unfinished_loss = 0;
  }
  if (state.best_metric == "training loss" ? losses : scores) {
    state.best_metric.clear();
    state.validations_since_best = 0;
  }
}

/// What a state of an older version does not say follows from the configuration that it was trained with.
inline void complete(TrainingState& state, const TrainingConfig& before) {
  if (state.unfinished_steps < 0) state.unfinished_steps = state.step % before.steps_per_epoch;
  if (state.examples < 0) state.examples = state.step * before.batch_size * before.gradient_accumulation_steps;
}

}  // namespace headroom::inline v0::training
