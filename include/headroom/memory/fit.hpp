#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <utility>

#include "headroom/checkpoint/cheapest_policy.hpp"
#include "headroom/memory/device_profile.hpp"
#include "headroom/memory/plan.hpp"

namespace headroom::inline v0 {

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
  const auto attempt = [&](const StackPolicy& policy) -> std::optional<PolicyChoice> {
    Plan needed = plan([&] { step(policy); }, device, options);
    if (!needed.fits) return std::nullopt;
    return PolicyChoice{policy, std::move(needed)};
  };
  return cheapest_policy(attempt, blocks);
}

}  // namespace headroom::inline v0
