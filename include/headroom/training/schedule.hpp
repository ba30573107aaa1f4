#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace headroom::inline v0::training {

/// Linear warm-up, then half a cosine down to `min_ratio` of the learning rate.
struct Schedule {
  double learning_rate = 3e-4;
  int64_t warmup_steps = 0;
  double min_ratio = 0.0;
};

/// Learning rate of step 0, 1, …, total_steps - 1; the minimum from total_steps on.
///
///   step < warmup:  learning_rate · (step + 1) / warmup
///   else:           learning_rate · (min_ratio + (1 - min_ratio) · (1 + cos(π · (step - warmup) / (total - warmup))) /
///   2)
///
/// A run that is shorter than two warm-ups warms up over its first half.
inline double learning_rate_at(const Schedule& schedule, int64_t step, int64_t total_steps) {
  const int64_t warmup = std::min(schedule.warmup_steps, total_steps / 2);
  if (step < warmup) {
    return schedule.learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
  }
  if (step >= total_steps) {
    return schedule.learning_rate * schedule.min_ratio;
  }
  const double progress = static_cast<double>(step - warmup) / static_cast<double>(total_steps - warmup);
  const double cosine = (1 + std::cos(std::numbers::pi * progress)) / 2;
  return schedule.learning_rate * (schedule.min_ratio + (1 - schedule.min_ratio) * cosine);
}

/// Number of steps that a run will have taken when its time budget ends, at the pace so far: what `total_steps` is for
/// a run that is limited by time. It started at step `first` and is about to take step `step` after `elapsed` seconds.
///
/// Before its first step is over a run has no pace. One that is resumed takes the `seconds_per_step` of the run before,
/// and where that is unknown (0) its first step for its last: a step at the least learning rate does no harm, one at
/// the highest would undo what was learned.
inline int64_t estimated_total_steps(int64_t first, int64_t step, double elapsed, double budget,
                                     double seconds_per_step = 0) {
  constexpr double kFar = 1e15;  // the end of a run that has not begun
  const double steps = static_cast<double>(step - first);
  const double fraction = std::clamp(elapsed / budget, 0.0, 1.0);
  const double all = steps > 0              ? steps / fraction
                     : seconds_per_step > 0 ? std::max(1.0, budget / seconds_per_step)
                     : first > 0            ? 1.0
                                            : kFar;
  return first + static_cast<int64_t>(std::min(kFar, std::round(all)));
}

}  // namespace headroom::inline v0::training
