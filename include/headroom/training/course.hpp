#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>

#include "headroom/training/choice.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/schedule.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

namespace detail {

inline double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace detail

/// The schedule of a configuration. Throws headroom.training.config for a name that is none of kDecayNames.
inline Schedule schedule_of(const TrainingConfig& training) {
  return {.learning_rate = training.learning_rate,
          .warmup_steps = training.warmup_steps,
          .min_ratio = training.min_learning_rate_ratio,
          .decay = chosen<Decay>(kDecayNames, training.schedule),
          .factor = training.plateau_factor};
}

/// A run under way: when and at which step it began, when the epoch did, and where it ends.
class Course {
 public:
  /// Begins now, at `first_step`.
  Course(const RunOptions& options, const TrainingConfig& training, int64_t first_step)
      : now_(options.clock ? options.clock : detail::steady_seconds),
        seconds_(options.seconds),
        schedule_(schedule_of(training)),
        start_(now_()),
        epoch_start_(start_),
        first_(first_step),
        last_(options.steps.value_or(options.seconds ? std::numeric_limits<int64_t>::max()
                                                     : training.epochs * training.steps_per_epoch)) {}

  /// Seconds on its clock, since the run began, and since the epoch did.
  double now() const { return now_(); }
  double elapsed() const { return now_() - start_; }
  double epoch_elapsed() const { return now_() - epoch_start_; }
  void begin_epoch() { epoch_start_ = now_(); }

  int64_t steps_taken(const TrainingState& state) const { return state.step - first_; }
  bool steps_left(const TrainingState& state) const { return state.step < last_; }
  bool time_left(double elapsed) const { return !seconds_ || elapsed < *seconds_; }

  /// The learning rate of the next step. Where time limits the run it follows from the pace so far, which the state
  /// takes note of.
  double learning_rate(TrainingState& state, double elapsed) const {
    int64_t total = last_;
    if (seconds_) {
      total = std::min(total, estimated_total_steps(first_, state.step, elapsed, *seconds_, state.seconds_per_step));
      if (state.step > first_) state.seconds_per_step = elapsed / static_cast<double>(steps_taken(state));
    }
    return learning_rate_at(schedule_, state.step, total, state.plateau);
  }

 private:
  std::function<double()> now_;
  std::optional<double> seconds_;
  Schedule schedule_;
  double start_, epoch_start_;
  int64_t first_, last_;
};

}  // namespace headroom::inline v0::training
