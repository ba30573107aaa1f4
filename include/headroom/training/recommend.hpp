#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/plan/policy_search.hpp"
#include "headroom/training/bucket.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/separate.hpp"

namespace headroom::inline v0::training {

/// A configuration that fits, and how it differs from the one that was asked for.
struct Recommendation {
  Config config;
  std::vector<Bucket> buckets;       ///< in the place of the configuration's batches, where they were given
  std::vector<std::string> changes;  ///< in words; empty: the configuration fits as it is
  bool same_training = true;         ///< the same gradients up to rounding
  Plan plan;
};

namespace detail {

/// The configuration, and with fewer bits where it has float: of the optimizer's state, of what autocast casts, of
/// both.
inline std::vector<Config> with_fewer_bits(const Config& config) {
  std::vector<std::string> states{config.training.optimizer_state};
  if (states.front() != "8bit") states.emplace_back("8bit");
  std::vector<Config> all;
  for (const bool bf16 : std::set{config.training.bf16, true}) {
    for (const std::string& state : states) {
      all.push_back(config);
      all.back().training.bf16 = bf16;
      all.back().training.optimizer_state = state;
    }
  }
  return all;
}

/// How a recommendation differs from the configuration that was asked for, in words.
inline std::vector<std::string> changes(const Config& from, const Recommendation& to) {
  const auto& [model, training] = std::tie(to.config.model, to.config.training);
  std::vector<std::string> changes;
  if (model.attention != from.model.attention) changes.push_back("model.attention: " + model.attention);
  if (training.optimizer_state != from.training.optimizer_state) {
    changes.push_back("training.optimizer_state: " + training.optimizer_state);
  }
  if (training.bf16 != from.training.bf16) changes.emplace_back("training.bf16: true");
  if (training.segment_length != from.training.segment_length && to.buckets.empty()) {
    changes.push_back("training.segment_length: " + std::to_string(training.segment_length));
  }
  if (model.gradient_checkpointing != from.model.gradient_checkpointing) {
    changes.push_back("model.gradient_checkpointing: " + model.gradient_checkpointing.text());
  }
  const bool split = training.gradient_accumulation_steps != from.training.gradient_accumulation_steps;
  if (split || !(to.same_training || to.buckets.empty())) {
    std::string shapes = "training.batch_size: " + std::to_string(training.batch_size);
    if (!to.buckets.empty()) {
      shapes = "buckets:";
      for (const Bucket& bucket : to.buckets) shapes += " " + to_string(bucket);
    }
    changes.push_back(shapes +
                      " with gradient_accumulation_steps: " + std::to_string(training.gradient_accumulation_steps));
  }
  return changes;
}

/// The search behind recommend().
class Recommender {
 public:
  /// Without `buckets`, batches are those of the configuration.
  Recommender(const Config& config, const DeviceProfile& device, const PlanOptions& options,
              const std::vector<Bucket>& buckets)
      : config_(config),
        device_(device),
        options_(options),
        bucketed_(!buckets.empty()),
        wanted_(bucketed_ ? buckets : std::vector{bucket_of(config)}),
        shortest_(wanted_.front().segment_length),
        recomputes_(config.model.blocks() > 0) {
    for (const Bucket& bucket : wanted_) {
      batch_ = std::gcd(batch_, bucket.batch_size);
      shortest_ = std::min(shortest_, bucket.segment_length);
    }
    // One cannot add to gradients, the other is not the mean over parts of a batch
    if (config.training.optimizer_in_backward || config.loss.compares_examples()) batch_ = 1;
  }

  std::optional<Recommendation> find() const {
    if (auto fits = replay(config_, 1, 1)) return fits;
    Config asked = config_;
    if (config_.model.attention == "reference") asked.model.attention = "automatic";
    const std::vector<Config> by_bits = with_fewer_bits(asked);
    // Divided by the denominators of shorter segments; the shortest is what the model and its loss still take
    std::vector<int64_t> parts{1, 2, 3, 4, 6, 8, 12, 16};
    std::erase_if(parts, [&](int64_t part) { return !takes_segments(config_, shortest_ / part); });
    return first_that_fits(parts, [&](int64_t part) {
      return first_that_fits(by_bits, [&](const Config& candidate) { return with_least_work(candidate, part); });
    });
  }

 private:
  /// The candidate with batches split into so many parts and segments shortened to one of so many, if that fits.
  std::optional<Recommendation> replay(Config candidate, int64_t split, int64_t part) const {
    Recommendation result;
    result.buckets = wanted_;
    result.same_training = part == 1 && candidate.training.bf16 == config_.training.bf16 &&
                           candidate.training.optimizer_state == config_.training.optimizer_state;
    for (Bucket& bucket : result.buckets) {
      bucket.batch_size /= split;
      bucket.segment_length /= part;
    }
    result.config = with_bucket(std::move(candidate), result.buckets.front());
    result.config.training.gradient_accumulation_steps *= split;
    result.plan = plan_steps(result.config, result.buckets, device_, options_).plan;
    if (!result.plan.fits) return std::nullopt;
    if (!bucketed_) result.buckets.clear();
    result.changes = changes(config_, result);
    return result;
  }

  /// The candidate with as little recomputation, then as few splits as fit.
  std::optional<Recommendation> with_least_work(Config candidate, int64_t part) const {
    StackPolicy& policy = candidate.model.gradient_checkpointing;
    const auto in_splits = [&](int64_t split) { return replay(candidate, split, part); };
    // Gradients that are added to are there during a pass: few tokens may need less memory in one pass
    std::vector<int64_t> leanest_splits{batch_};
    if (config_.training.gradient_accumulation_steps == 1 && batch_ > 1) leanest_splits.push_back(1);
    const auto in_least = [&](const StackPolicy& under) {
      policy = under;
      return first_that_fits(leanest_splits, in_splits);
    };
    const StackPolicy& given = config_.model.gradient_checkpointing;
    // Where the least of all does not fit, none does
    auto chosen = in_least(recomputes_ ? StackPolicy(policies_by_cost().back()) : given);
    if (chosen && recomputes_) chosen = cheapest_policy(in_least, config_.model.blocks(), given);
    if (!chosen) return std::nullopt;
    policy = chosen->config.model.gradient_checkpointing;
    std::vector<int64_t> fewer_splits;
    for (int64_t split = 1; split < batch_; ++split) {
      if (batch_ % split == 0) fewer_splits.push_back(split);
    }
    auto with_fewer = first_that_fits(fewer_splits, in_splits);
    return with_fewer ? std::move(with_fewer) : std::move(chosen);
  }

  const Config& config_;
  const DeviceProfile& device_;
  const PlanOptions& options_;
  bool bucketed_;
  std::vector<Bucket> wanted_;
  int64_t batch_ = 0;  ///< what can be split alike in all buckets
  int64_t shortest_;   ///< segment
  bool recomputes_;    ///< there are blocks that a checkpoint policy decides about
};

}  // namespace detail

/// The first of these that fits a device: the configuration as it is; attention that stores no scores; smaller batches
/// with more accumulation, which cost no operations; checkpoint policies, block by block (cheapest_policy), which cost
/// a forward pass at most, in slices and with inputs on the host where that is needed. Then what trains something else:
/// all of that with fewer bits, of the optimizer's state or by bf16 autocast, and with shorter segments. With
/// `buckets`, batches have their shapes instead of the configuration's, and what is recommended fits with all of them.
/// Each is judged by replaying it. The order does not depend on the budget, so that a larger one never gets a worse
/// answer, and a smaller one never a higher peak. Throws as plan_training and plan_buckets do; none: nothing fits.
HEADROOM_TRAINING std::optional<Recommendation> recommend(const Config& config, const DeviceProfile& device,
                                                          const PlanOptions& options = {},
                                                          const std::vector<Bucket>& buckets = {});

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING std::optional<Recommendation> recommend(const Config& config, const DeviceProfile& device,
                                                          const PlanOptions& options,
                                                          const std::vector<Bucket>& buckets) {
  if (!buckets.empty()) detail::check_buckets(config, buckets);
  return detail::Recommender(config, device, options, buckets).find();
}
#endif

/// The recommendation in a few lines.
inline std::string describe(const std::optional<Recommendation>& recommendation) {
  if (!recommendation) return "nothing fits: choose a smaller model\n";
  if (recommendation->changes.empty()) return "it fits as it is\n";
  std::string text = "this fits (";
  text += recommendation->same_training ? "the same training" : "other training";
  text += "), peak " + format_bytes(recommendation->plan.peak_bytes) + ":\n";
  for (const std::string& change : recommendation->changes) text += "  " + change + "\n";
  return text;
}

}  // namespace headroom::inline v0::training
