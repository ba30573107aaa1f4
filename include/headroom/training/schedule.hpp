#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace headroom::inline v0::training {

/// What becomes of the learning rate after the warm-up: it falls along half a cosine or in a line, stays, or is lowered
/// each time that the score stopped getting better.
enum class Decay { cosine, linear, constant, plateau };
inline constexpr std::array<const char*, 4> kDecayNames{"cosine", "linear", "constant", "plateau"};

/// Linear warm-up, then `decay` down to `min_ratio` of the learning rate.
struct Schedule {
  double learning_rate = 3e-4;
  int64_t warmup_steps = 0;
  double min_ratio = 0.0;
  Decay decay = Decay::cosine;
  double factor = 0.5;  ///< of plateau, each time
};

/// How a schedule of Decay::plateau stands.
struct Plateau {
  int64_t waited = 0;   ///< scores since the best one, or since the learning rate was lowered
  int64_t lowered = 0;  ///< how often it was

  /// Takes a score: after more than `patience` of them in a row without a better one the learning rate is lowered.
  void take(bool is_best, int64_t patience) {
    waited = is_best ? 0 : waited + 1;
    if (waited <= patience) return;
    waited = 0;
    ++lowered;
  }
};

namespace detail {

/// The share of the learning rate that is left after `progress`, 0 to 1, of what comes after the warm-up.
inline double share_left(const Schedule& schedule, double progress, const Plateau& plateau) {
  const auto between = [&](double share) { return schedule.min_ratio + (1 - schedule.min_ratio) * share; };
  switch (schedule.decay) {
    case Decay::cosine:
      return between((1 + std::cos(std::numbers::pi * progress)) / 2);
    case Decay::linear:
      return between(1 - progress);
    case Decay::constant:
      return 1;
    case Decay::plateau:
      return std::max(schedule.min_ratio, std::pow(schedule.factor, static_cast<double>(plateau.lowered)));
  }
  return 1;
}

}  // namespace detail

/// Learning rate of step 0, 1, …, total_steps - 1; that of the end from total_steps on.
///
///   step < warmup:  learning_rate · (step + 1) / warmup
///   else, with progress p = (step - warmup) / (total - warmup), by decay
///     cosine:       learning_rate · (min_ratio + (1 - min_ratio) · (1 + cos(π · p)) / 2)
///     linear:       learning_rate · (min_ratio + (1 - min_ratio) · (1 - p))
///     constant:     learning_rate
///     plateau:      learning_rate · max(min_ratio, factor ^ plateau.lowered)
///
/// A run that is shorter than two warm-ups warms up over its first half.
inline double learning_rate_at(const Schedule& schedule, int64_t step, int64_t total_steps,
                               const Plateau& plateau = {}) {
  const int64_t warmup = std::min(schedule.warmup_steps, total_steps / 2);
  if (step < warmup) {
    return schedule.learning_rate * static_cast<double>(step + 1) / static_cast<double>(warmup);
  }
  const double progress =
      step >= total_steps ? 1 : static_cast<double>(step - warmup) / static_cast<double>(total_steps - warmup);
  return schedule.learning_rate * detail::share_left(schedule, progress, plateau);
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
