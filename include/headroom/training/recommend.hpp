#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "headroom/training/plan.hpp"

namespace headroom::inline v0::training {

/// A configuration that fits, and how it differs from the one that was asked for.
struct Recommendation {
  Config config;
  std::vector<std::string> changes;  ///< in words; empty: the configuration fits as it is
  bool same_training = true;         ///< the same gradients up to rounding
  Plan plan;
};

namespace detail {

/// Checkpoint policies in the order in which they are tried, by the operations that they add, then by what they need
/// beside the memory. All give the same gradients up to rounding: bf16 does not. The others need more of both than one
/// of these.
inline std::vector<CheckpointPolicy> policies_by_cost() {
  return {"none", "selective", "full", "tiled", "full+offload", "tiled+offload"};
}

/// A policy and those that come after it.
inline std::vector<CheckpointPolicy> policies_from(const CheckpointPolicy& first) {
  const std::vector<CheckpointPolicy> all = policies_by_cost();
  const auto place = std::find(all.begin(), all.end(), first);
  if (place != all.end()) return {place, all.end()};
  std::vector<CheckpointPolicy> from{first};
  from.insert(from.end(), std::find(all.begin(), all.end(), CheckpointPolicy(true)), all.end());
  return from;
}

}  // namespace detail

/// The first of these that fits a device: the configuration as it is; attention that stores no scores; smaller batches
/// with more accumulation, which cost no operations; checkpoint policies, which cost a forward pass at most, in
/// slices and with inputs on the host where that is needed; and only then shorter segments, which train something else.
/// Each is judged by replaying it. The order does not depend on the budget, so that a larger one never gets a worse
/// answer, and a smaller one never a higher peak. Throws as plan_training does; none: nothing fits.
inline std::optional<Recommendation> recommend(const Config& config, const DeviceProfile& device,
                                               const PlanOptions& options = {}) {
  const auto attempt = [&](Config candidate, std::vector<std::string> changes, bool same) {
    Plan plan = plan_training(candidate, device, options);
    return plan.fits ? std::optional(Recommendation{std::move(candidate), std::move(changes), same, std::move(plan)})
                     : std::nullopt;
  };
  if (auto fits = attempt(config, {}, true)) return fits;
  const std::vector<CheckpointPolicy> policies = config.model.reversible
                                                     ? std::vector{config.model.gradient_checkpointing}
                                                     : detail::policies_from(config.model.gradient_checkpointing);
  // Divided by the denominators of shorter segments; the shortest is what the STFT and its loss still take
  for (const int64_t part : {1, 2, 3, 4, 6, 8, 12, 16}) {
    Config shorter = config;
    std::vector<std::string> changes;
    if (config.model.attention == "reference") {
      shorter.model.attention = "automatic";
      changes.emplace_back("model.attention: automatic");
    }
    shorter.training.segment_length = config.training.segment_length / part;
    if (shorter.training.segment_length <= std::max(config.model.n_fft, config.loss.min_n_fft)) break;
    if (part > 1) changes.push_back("training.segment_length: " + std::to_string(shorter.training.segment_length));
    const auto candidate_with = [&](const CheckpointPolicy& policy, int64_t split) {
      Config candidate = shorter;
      candidate.model.gradient_checkpointing = policy;
      candidate.training.batch_size /= split;
      candidate.training.gradient_accumulation_steps *= split;
      return candidate;
    };
    // Where the least of all does not fit, none does
    if (!attempt(candidate_with(policies.back(), config.training.batch_size), {}, true)) continue;
    for (const CheckpointPolicy& policy : policies) {
      for (int64_t split = 1; split <= config.training.batch_size; ++split) {
        if (config.training.batch_size % split != 0) continue;
        Config candidate = candidate_with(policy, split);
        std::vector<std::string> all = changes;
        if (policy != config.model.gradient_checkpointing) {
          all.push_back("model.gradient_checkpointing: " + policy.text());
        }
        if (split > 1) {
          all.push_back(
              "training.batch_size: " + std::to_string(candidate.training.batch_size) +
              " with gradient_accumulation_steps: " + std::to_string(candidate.training.gradient_accumulation_steps));
        }
        if (all.empty()) continue;  // as it is
        if (auto fits = attempt(std::move(candidate), std::move(all), part == 1)) return fits;
      }
    }
  }
  return std::nullopt;
}

/// The recommendation in a few lines.
inline std::string describe(const std::optional<Recommendation>& recommendation) {
  if (!recommendation) return "nothing fits: choose a smaller model\n";
  if (recommendation->changes.empty()) return "it fits as it is\n";
  std::string text = "this fits (";
  text += recommendation->same_training ? "the same training" : "other training: shorter segments";
  text += "), peak " + format_bytes(recommendation->plan.peak_bytes) + ":\n";
  for (const std::string& change : recommendation->changes) text += "  " + change + "\n";
  return text;
}

}  // namespace headroom::inline v0::training
