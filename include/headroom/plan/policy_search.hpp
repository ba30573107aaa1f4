#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <optional>
#include <ranges>
#include <type_traits>
#include <utility>
#include <vector>

#include "headroom/checkpoint/policy.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/plan.hpp"

// Which candidate fits: the search behind fit_policy, training::recommend and `train --fit`. A candidate is anything
// that makes a step smaller, such as a checkpoint policy or the size of a batch. replay(candidate) is an optional,
// empty where memory does not suffice; it is asked in the order in which candidates are wished for.

namespace headroom::inline v0 {

/// What `replay` gives for the first of `candidates` for which it gives something.
template <std::ranges::input_range Candidates, std::invocable<std::ranges::range_reference_t<Candidates>> Replay>
std::invoke_result_t<Replay&, std::ranges::range_reference_t<Candidates>> first_that_fits(Candidates&& candidates,
                                                                                          Replay&& replay) {
  for (auto&& candidate : candidates) {
    if (auto found = replay(candidate)) return found;
  }
  return {};
}

/// Checkpoint policies by the operations that they add, then by what they need beside memory; each needs less memory
/// than those before. All give the same gradients up to rounding: bf16 does not. The others need more of both than one
/// of these, or than a mix of two neighbours.
inline std::vector<CheckpointPolicy> policies_by_cost() {
  return {"none", "selective", "full", "tiled", "tiled+offload"};
}

/// A stack of `blocks` blocks of which `count`, at least one and not all, have the leaner of two neighbours by cost.
///
/// Backward takes the last block first and frees what it held, so what early blocks hold is there longest: they get the
/// leaner policy, and when they are computed again, what late blocks held is gone. Only from full to tiled it is the
/// other way round: both hold the same, and full needs more while a block runs; early blocks run when the inputs of the
/// late ones are gone.
inline StackPolicy mixed_policy(const CheckpointPolicy& cheaper, const CheckpointPolicy& leaner, int64_t count,
                                int64_t blocks) {
  using Recompute = CheckpointPolicy::Recompute;
  if (cheaper.recompute == Recompute::full && leaner.recompute == Recompute::tiled)
    return {{{blocks - count, cheaper}}, leaner};
  return {{{count, leaner}}, cheaper};
}

namespace detail {

/// The first of policies_by_cost() that is part of `policy`; none is: full.
inline CheckpointPolicy cheapest_part(const StackPolicy& policy) {
  for (const CheckpointPolicy& candidate : policies_by_cost()) {
    const auto is_candidate = [&](const StackPolicy::Part& part) { return part.policy == candidate; };
    if (policy.rest == candidate || std::ranges::any_of(policy.first, is_candidate)) return candidate;
  }
  return true;
}

}  // namespace detail

/// What `replay` gives for the cheapest checkpoint policy of a stack of `blocks` blocks for which it gives something.
/// Tried are `given`, policies_by_cost() from the first that is part of it, and between two of these as few blocks as
/// possible under the leaner one.
///
/// The number of blocks is found by bisection: peaks fall with every block. So where memory is the larger, the policy
/// is never costlier, and where it is the smaller, its peak is never higher.
template <std::invocable<StackPolicy> Replay>
std::invoke_result_t<Replay&, StackPolicy> cheapest_policy(Replay&& replay, int64_t blocks,
                                                           const StackPolicy& given = {}) {
  const std::vector<CheckpointPolicy> policies = policies_by_cost();
  const auto first = std::ranges::find(policies, detail::cheapest_part(given));
  if (given != *first) {
    if (auto found = replay(given)) return found;
  }
  for (auto policy = first; policy != policies.end(); ++policy) {
    auto best = replay(*policy);
    if (!best) continue;
    if (policy == first) return best;
    for (int64_t too_few = 0, enough = blocks; enough - too_few > 1;) {
      const int64_t count = std::midpoint(too_few, enough);
      auto found = replay(mixed_policy(*std::prev(policy), *policy, count, blocks));
      (found ? enough : too_few) = count;
      if (found) best = std::move(found);
    }
    return best;
  }
  return {};
}

/// A checkpoint policy under which a step fits, and what the step needs.
struct PolicyChoice {
  StackPolicy policy;
  Plan plan;
};

/// The cheapest checkpoint policy under which a step fits a device, block by block; none: not even the leanest does.
/// step(policy) builds and runs a step whose stack of `blocks` blocks has the policy; it is replayed under each
/// candidate (cheapest_policy) as plan() does. Throws as plan() does.
///
///     const auto choice = fit_policy([](const StackPolicy& policy) {
///       nn::Encoder encoder(nn::EncoderOptions(192, 12, {768}, 12).gradient_checkpointing(policy));
///       encoder->forward(torch::randn({2, 2048, 192})).square().mean().backward();
///     }, 12, device_profile("rtx-4090-24gb"));
template <std::invocable<const StackPolicy&> Step>
std::optional<PolicyChoice> fit_policy(Step&& step, int64_t blocks, const DeviceProfile& device,
                                       const PlanOptions& options = {}) {
  const auto replay = [&](const StackPolicy& policy) -> std::optional<PolicyChoice> {
    Plan needed = plan([&] { step(policy); }, device, options);
    if (!needed.fits) return std::nullopt;
    return PolicyChoice{policy, std::move(needed)};
  };
  return cheapest_policy(replay, blocks);
}

}  // namespace headroom::inline v0
