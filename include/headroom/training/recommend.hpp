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

}  // namespace detail

/// The first of these that fits a device: the configuration as it is; attention that stores no scores; smaller batches
/// with more accumulation, which cost no operations; checkpoint policies, block by block (cheapest_policy), which cost
/// a forward pass at most, in slices and with inputs on the host where that is needed. Then what trains something else:
/// all of that with fewer bits, of the optimizer's state or by bf16 autocast, and with shorter segments. With
/// `buckets`, batches have their shapes instead of the configuration's, and what is recommended fits with all of them.
/// Each is judged by replaying it. The order does not depend on the budget, so that a larger one never gets a worse
/// answer, and a smaller one never a higher peak. Throws as plan_training and plan_buckets do; none: nothing fits.
inline std::optional<Recommendation> recommend(const Config& config, const DeviceProfile& device,
                                               const PlanOptions& options = {},
                                               const std::vector<Bucket>& buckets = {}) {
  if (!buckets.empty()) detail::check_buckets(config, buckets);
  const std::vector<Bucket> wanted = buckets.empty() ? std::vector{bucket_of(config)} : buckets;
  int64_t batch = 0, shortest = wanted.front().segment_length;  // batch: what can be split alike in all buckets
  for (const Bucket& bucket : wanted) {
    batch = std::gcd(batch, bucket.batch_size);
    shortest = std::min(shortest, bucket.segment_length);
  }
  if (config.training.optimizer_in_backward) batch = 1;  // which cannot add to gradients
  // Batches are split into as many parts, segments are shortened to one of as many
  const auto attempt = [&](Config candidate, int64_t split, int64_t part) -> std::optional<Recommendation> {
    Recommendation result;
    result.buckets = wanted;
    result.same_training = part == 1 && candidate.training.bf16 == config.training.bf16 &&
                           candidate.training.optimizer_state == config.training.optimizer_state;
    for (Bucket& bucket : result.buckets) {
      bucket.batch_size /= split;
      bucket.segment_length /= part;
    }
    result.config = with_bucket(std::move(candidate), result.buckets.front());
    result.config.training.gradient_accumulation_steps *= split;
    result.plan = detail::plan_steps(result.config, result.buckets, device, options).plan;
    if (!result.plan.fits) return std::nullopt;
    if (buckets.empty()) result.buckets.clear();
    result.changes = detail::changes(config, result);
    return result;
  };
  if (auto fits = attempt(config, 1, 1)) return fits;
  Config asked = config;
  if (config.model.attention == "reference") asked.model.attention = "automatic";
  const StackPolicy& given = config.model.gradient_checkpointing;
  const bool recomputes = config.model.blocks() > 0;
  const StackPolicy leanest = recomputes ? policies_by_cost().back() : given;
  // The candidate with as little recomputation, then as few splits as fit
  const auto fit = [&](Config candidate, int64_t part) -> std::optional<Recommendation> {
    const auto with = [&](const StackPolicy& policy) {
      candidate.model.gradient_checkpointing = policy;
      return candidate;
    };
    const auto in_least = [&](const StackPolicy& policy) {
      auto fits = attempt(with(policy), batch, part);
      // Gradients that are added to are there during a pass: few tokens may need less memory in one pass
      const bool adds = config.training.gradient_accumulation_steps > 1;
      return fits || adds || batch == 1 ? fits : attempt(with(policy), 1, part);
    };
    auto chosen = in_least(leanest);  // where the least of all does not fit, none does
    if (chosen && recomputes) chosen = cheapest_policy(in_least, config.model.blocks(), given);
    if (!chosen) return std::nullopt;
    const StackPolicy policy = chosen->config.model.gradient_checkpointing;
    for (int64_t split = 1; split < batch; ++split) {
      if (batch % split != 0) continue;
      if (auto fits = attempt(with(policy), split, part)) return fits;
    }
    return chosen;
  };
  // Divided by the denominators of shorter segments; the shortest is what the model and its loss still take
  for (const int64_t part : {1, 2, 3, 4, 6, 8, 12, 16}) {
    if (!takes_segments(config, shortest / part)) break;
    for (const Config& candidate : detail::with_fewer_bits(asked)) {
      if (auto fits = fit(candidate, part)) return fits;
    }
  }
  return std::nullopt;
}

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
