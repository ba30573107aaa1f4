#pragma once

#include <cstdint>
#include <string>

#include "headroom/memory/format.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"

namespace headroom::inline v0::training {

/// Why training by a configuration ran out of memory, once its tensors had taken `peak_bytes` (Trainer::peak_bytes):
/// the allocation that failed, with shape and module, who held the rest, and the smallest change that needs no more
/// than what had been had already. Found by replaying the configuration: the first allocation that takes the sum of all
/// tensors above `peak_bytes` is the one that failed. Throws as plan_training does.
inline std::string explain_out_of_memory(const Config& config, const DeviceProfile& device, int64_t peak_bytes) {
  DeviceProfile exact = device;
  exact.caching_allocator = false;  // peak_bytes is what tensors took, not what was reserved for them
  const Plan plan = plan_training(config, exact, {.budget = peak_bytes});
  if (!plan.fits) return explain(plan) + describe(recommend(config, device, {.budget = peak_bytes}));
  return "tensors had taken " + format_bytes(peak_bytes) + ", and a step needs " + format_bytes(plan.peak_bytes) +
         " by its plan: something outside of the step takes the rest\n";
}

}  // namespace headroom::inline v0::training
