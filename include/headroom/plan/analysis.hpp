#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/separate_kernels.hpp"
#include "headroom/plan/allocator_model.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0::detail {

/// Sends the events of the trace through the device's allocator: the peak, what is reserved, whether all of it fits.
inline void replay_allocations(Plan& plan) {
  const auto& blocks = plan.trace.blocks;
  const CachingAllocatorOptions options{.expandable_segments = plan.device.expandable_segments};
  CachingAllocatorModel allocator(plan.budget, options), unlimited(std::numeric_limits<int64_t>::max() / 2, options);
  std::vector<std::optional<int64_t>> by_phase(plan.trace.names.size());
  int64_t live = 0;
  for (const BlockEvent& event : block_events(plan.trace)) {
    const auto& block = blocks[event.block];
    live += event.begins ? block.bytes : -block.bytes;
    if (plan.device.caching_allocator) {
      const auto id = static_cast<int64_t>(event.block);
      event.begins ? static_cast<void>(unlimited.allocate(id, block.bytes)) : unlimited.release(id);
      if (!plan.first_over) {
        if (!event.begins) {
          allocator.release(id);
        } else if (!allocator.allocate(id, block.bytes)) {
          plan.first_over = event.block;
        }
      }
    } else if (live > plan.budget && !plan.first_over) {
      plan.first_over = event.block;
    }
    if (live > plan.peak_bytes) {
      plan.peak_bytes = live;
      plan.peak_time = event.time;
    }
    auto& of_phase = by_phase[static_cast<size_t>(block.phase)];
    of_phase = std::max(of_phase.value_or(0), live);
    if (event.begins && block.bytes > blocks[plan.largest].bytes) plan.largest = event.block;
  }
  plan.fits = !plan.first_over.has_value();
  // A full device gives cached segments back before it fails: what fits holds at most the budget
  plan.reserved_bytes = !plan.device.caching_allocator ? plan.peak_bytes
                        : plan.fits                    ? allocator.peak_reserved()
                                                       : unlimited.peak_reserved();
  for (size_t name = 0; name < by_phase.size(); ++name) {
    if (by_phase[name]) plan.by_phase[plan.trace.names[name]] = *by_phase[name];
  }
}

/// Says what the peak is made of and who holds it.
inline void blame_peak(Plan& plan) {
  const auto& blocks = plan.trace.blocks;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto& block = blocks[i];
    if (block.begin > plan.peak_time || block.end <= plan.peak_time) continue;
    plan.at_peak.push_back(i);
    plan.parts[static_cast<size_t>(block.use)] += block.bytes;
    plan.by_module[plan.module_of(block)] += block.bytes;
    plan.by_operator[plan.operator_of(block)] += block.bytes;
  }
  std::stable_sort(plan.at_peak.begin(), plan.at_peak.end(),
                   [&](size_t a, size_t b) { return blocks[a].bytes > blocks[b].bytes; });
}

inline void count_flops(Plan& plan) {
  for (const auto& op : plan.trace.operators) {
    if (op.flops == 0) continue;
    plan.flops += op.flops;
    plan.flops_by_operator[plan.trace.names[static_cast<size_t>(op.name)]] += op.flops;
    plan.flops_by_phase[plan.trace.names[static_cast<size_t>(op.phase)]] += op.flops;
  }
}

/// The plan that a trace gives on a device. `budget`: bytes that tensors may take, the device's usable ones unless
/// given.
HEADROOM_KERNEL Plan analyse(MemoryTrace trace, const DeviceProfile& device, std::optional<int64_t> budget);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL Plan analyse(MemoryTrace trace, const DeviceProfile& device, std::optional<int64_t> budget) {
  Plan plan{.device = device, .budget = budget.value_or(device.usable_bytes()), .trace = std::move(trace)};
  plan.values_read = plan.trace.values_read;
  plan.estimated = plan.trace.estimated;
  if (!device.device().is_cpu()) {
    std::erase_if(plan.trace.blocks, [](const auto& block) { return block.on_host; });
  }
  replay_allocations(plan);
  blame_peak(plan);
  count_flops(plan);
  return plan;
}
#endif

}  // namespace headroom::inline v0::detail
