#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/plan/allocator_model.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0::detail {

inline Plan analyse(MemoryTrace trace, const DeviceProfile& device, std::optional<int64_t> budget) {
  Plan plan{.device = device, .budget = budget.value_or(device.usable_bytes()), .trace = std::move(trace)};
  plan.estimated = plan.trace.estimated;
  auto& blocks = plan.trace.blocks;
  if (!device.device().is_cpu()) {
    std::erase_if(blocks, [](const auto& block) { return block.on_host; });
  }
  const std::vector<BlockEvent> events = block_events(plan.trace);
  CachingAllocatorModel allocator(plan.budget, {.expandable_segments = device.expandable_segments});
  CachingAllocatorModel unlimited(std::numeric_limits<int64_t>::max() / 2,
                                  {.expandable_segments = device.expandable_segments});
  int64_t live = 0;
  for (const BlockEvent& event : events) {
    const auto& block = blocks[event.block];
    live += event.begins ? block.bytes : -block.bytes;
    if (device.caching_allocator) {
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
    int64_t& of_phase = plan.by_phase[plan.phase_of(block)];
    of_phase = std::max(of_phase, live);
    if (event.begins && block.bytes > blocks[plan.largest].bytes) plan.largest = event.block;
  }
  plan.fits = !plan.first_over.has_value();
  // A full device gives cached segments back before it fails: what fits holds at most the budget
  plan.reserved_bytes = !device.caching_allocator ? plan.peak_bytes
                        : plan.fits               ? allocator.peak_reserved()
                                                  : unlimited.peak_reserved();
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
  for (const auto& op : plan.trace.operators) {
    if (op.flops == 0) continue;
    plan.flops += op.flops;
    plan.flops_by_operator[plan.trace.names[static_cast<size_t>(op.name)]] += op.flops;
    plan.flops_by_phase[plan.trace.names[static_cast<size_t>(op.phase)]] += op.flops;
  }
  return plan;
}

}  // namespace headroom::inline v0::detail
