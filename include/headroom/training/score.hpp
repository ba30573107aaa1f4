#pragma once

#include <string>

#include "headroom/core/finite.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

/// How good a model is after an epoch.
struct Score {
  std::string metric;  ///< what `value` measures, such as "validation nSDR"
  double value = 0;
  bool more_is_better = true;
};

/// Takes note of a score: the best so far, or one more since. Says whether it is better than all before it. Scores of
/// different metrics are not compared: the first one of another metric replaces the best one. One that is not finite is
/// never better.
inline bool improves(TrainingState& state, const Score& score) {
  const bool usable = core::detail::is_finite(score.value);
  const bool better = score.more_is_better ? score.value > state.best_score : score.value < state.best_score;
  if (!usable || (!better && score.metric == state.best_metric)) {
    ++state.validations_since_best;
    return false;
  }
  state.validations_since_best = 0;
  state.best_metric = score.metric;
  state.best_score = score.value;
  return true;
}

}  // namespace headroom::inline v0::training
