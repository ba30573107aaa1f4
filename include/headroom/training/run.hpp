#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "headroom/memory/phase_meter.hpp"

namespace headroom::inline v0::training {

/// What happened in one optimizer step.
struct StepReport {
  int64_t step = 0;                ///< optimizer steps taken
  int64_t epoch = 1;               ///< the epoch that this step belongs to, from 1
  int64_t epoch_step = 0;          ///< steps taken in this epoch
  int64_t epoch_steps_in_run = 0;  ///< those of them that this run took
  double epoch_seconds = 0;        ///< that they took
  int64_t skipped_steps = 0;       ///< of all steps so far: their loss or gradient was not finite
  int64_t steps_per_epoch = 0;     ///< of this epoch: more than configured when it was begun with longer ones
  double loss = 0;                 ///< mean over the epoch so far, without steps that were skipped
  double step_loss = 0;            ///< of this step alone; not finite when it was skipped
  double learning_rate = 0;
  /// Before it is clipped; none with the optimizer in the backward pass, or of a loss that is not finite.
  std::optional<double> gradient_norm = {};
  double seconds = 0;                 ///< that this step took
  std::vector<PhaseUse> phases = {};  ///< of it: data, forward, loss, backward, optimizer
  int64_t live_bytes = 0;             ///< held by tensors
  int64_t peak_bytes = 0;             ///< highest live_bytes so far
  int64_t examples = 0;               ///< of this step
  int64_t microbatch = 0;             ///< examples in one pass: batch_size, or less since memory ran out
};

/// What came out of a run.
struct Summary {
  int64_t steps = 0;                 ///< optimizer steps taken since the first start
  int64_t skipped_steps = 0;         ///< those of them whose loss or gradient was not finite
  double seconds = 0;                ///< wall clock of this run
  int64_t peak_bytes = 0;            ///< highest sum of all tensors in this run
  std::vector<double> epoch_losses;  ///< mean loss of each epoch; the last one may be unfinished
  std::optional<double> validation;  ///< what validate gave last
  std::string best_metric;           ///< what chose best.pt
  double best_score = 0;             ///< its best value
  bool stopped = false;              ///< ended because it was told to stop, before its end
  bool out_of_patience = false;      ///< ended since no validation of the last ones was better than the best
  std::vector<PhaseUse> phases;      ///< of all steps and validations of this run
};

/// How long a run takes and who is told. Without `steps` and `seconds` it takes the configuration's epochs.
struct RunOptions {
  std::optional<int64_t> steps = {};   ///< end at this step, counted from the first start
  std::optional<double> seconds = {};  ///< end after this wall-clock time; the schedule follows the pace
  std::filesystem::path folder = {};   ///< of this run alone, for saved states; empty: none
  /// Mean of training.best_metric; without it the training loss chooses best.pt, and patience is not asked for.
  std::function<double()> validate = {};
  std::function<void(const StepReport&)> on_step = {};  ///< called after each step
  /// Told of what went wrong and does not end the run: steps that are skipped.
  std::function<void(const std::string&)> on_notice = {};
  std::function<std::string(int64_t)> origin = {};  ///< where an example comes from, for messages
  std::function<bool()> stop_requested = {};        ///< asked after each step
  std::function<double()> clock = {};               ///< seconds that only grow; default: std::chrono::steady_clock
};

}  // namespace headroom::inline v0::training
