#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/plan/allocator_model.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/meta_autocast.hpp"
#include "headroom/plan/meta_kernels.hpp"
#include "headroom/plan/trace.hpp"
#include "headroom/runtime/ambient_state.hpp"

namespace headroom::inline v0 {

struct PlanOptions {
  /// Bytes that tensors may take; the device's usable bytes unless given.
  std::optional<int64_t> budget = {};
  /// What reading a value gives, as .item() does; unless given, a step that reads one cannot be planned.
  std::optional<double> value = {};
};

/// What a step will need, without having run it. Bytes are those that tensors ask for; `reserved_bytes` is what the
/// device's allocator makes of them.
struct Plan {
  using Block = MemoryTrace::Block;

  DeviceProfile device;
  int64_t budget = 0;  ///< bytes that tensors may take
  MemoryTrace trace;

  int64_t peak_bytes = 0;
  int64_t peak_time = 0;  ///< the event after which the peak is reached
  int64_t reserved_bytes = 0;
  bool fits = false;
  double flops = 0;
  int64_t values_read = 0;  ///< readings that got PlanOptions::value

  std::array<int64_t, kMemoryUses> parts{};         ///< the peak by MemoryUse
  std::map<std::string, int64_t> by_phase = {};     ///< highest sum while a phase runs
  std::map<std::string, int64_t> by_module = {};    ///< the peak by the path of the module that asked for it
  std::map<std::string, int64_t> by_operator = {};  ///< the peak by the operator that asked for it
  std::map<std::string, double> flops_by_operator = {};
  std::map<std::string, double> flops_by_phase = {};
  std::vector<size_t> at_peak = {};         ///< blocks alive at the peak, largest first
  size_t largest = 0;                       ///< the largest block of all; blocks may be empty
  std::optional<size_t> first_over = {};    ///< the allocation that the budget has no room for; none: all have
  std::vector<std::string> estimated = {};  ///< operators of the step whose memory is not known exactly here

  /// What the system's own tools will show at the peak, top or nvidia-smi: with what the process and its libraries
  /// take.
  int64_t occupied_bytes() const { return device.context_bytes + device.workspace_bytes + reserved_bytes; }
  const Block* largest_block() const { return trace.blocks.empty() ? nullptr : &trace.blocks[largest]; }
  /// "encoder.layers.0.frequency.attention"; empty outside of all modules.
  const std::string& module_of(const Block& block) const { return trace.names[static_cast<size_t>(block.module)]; }
  /// The operator that the code called: "aten::matmul", not the "aten::bmm" inside of it.
  const std::string& operator_of(const Block& block) const {
    static const std::string outside = "(none)";
    if (block.op < 0) return outside;
    const MemoryTrace::Operator* op = &trace.operators[static_cast<size_t>(block.op)];
    while (op->parent >= 0 && !trace.operators[static_cast<size_t>(op->parent)].is_node) {
      op = &trace.operators[static_cast<size_t>(op->parent)];
    }
    return trace.names[static_cast<size_t>(op->name)];
  }
  const std::string& phase_of(const Block& block) const { return trace.names[static_cast<size_t>(block.phase)]; }
};

namespace detail {

/// The trace of a dry run of `step` on a device of the given type. Random generators are as before afterwards.
inline MemoryTrace dry_trace(const std::function<void()>& step, c10::Device device, std::optional<double> value,
                             int64_t& values_read) {
  const RandomState random = RandomState::capture();
  const MetaKernels kernels;
  TraceRecorder recorder;
  struct Restore {
    const RandomState& random;
    const TraceRecorder& recorder;
    std::optional<double> value = meta::value_read;
    int64_t count = std::exchange(meta::values_read, 0);
    std::set<std::string> estimated = std::exchange(meta::estimated, {});
    ~Restore() {
      meta::value_read = value;
      meta::values_read = count;
      meta::estimated = std::move(estimated);
      if (recorder.drew()) random.apply();  // else it would undo what other threads have drawn
    }
  } restore{random, recorder};
  meta::value_read = value;
  try {
    const DryRun run(device);
    const MetaAutocast autocast;
    step();
  } catch (const c10::NotImplementedError& error) {
    const std::string text = error.what_without_backtrace();
    constexpr std::string_view kNames = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
    const size_t colons = std::min(text.find("::"), text.size());
    const size_t first = text.find_last_not_of(kNames, colons - 1) + 1;
    const size_t last = text.find_first_not_of(std::string(kNames) + ".", std::min(colons + 2, text.size()));
    const std::string library = text.substr(first, colons - first);
    const std::string name = colons == text.size() ? "(unknown)" : text.substr(colons + 2, last - colons - 2);
    fail("headroom.memory.plan.operator", "the step calls ", library, "::", name,
         ", which has no kernel that computes shapes only. Register one before planning:\n  TORCH_LIBRARY_IMPL(",
         library, ", Meta, m) {\n    m.impl(\"", name,
         "\", [](/* its arguments */) { return at::empty(/* its sizes */); });\n  }\nLibTorch says: ",
         text.substr(0, text.find('\n')));
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    if (text.find("meta tensor") == std::string::npos && text.find("is not allocated yet") == std::string::npos &&
        text.find("data is not allocated") == std::string::npos) {
      throw;
    }
    fail("headroom.memory.plan.values",
         "the step reads the data of a tensor, which has none while it is planned: ", text.substr(0, text.find('\n')),
         "; keep what the CPU reads in a HostTensors scope, or take it out of the step");
  }
  values_read = meta::values_read;
  MemoryTrace trace = recorder.finish();
  trace.estimated.assign(meta::estimated.begin(), meta::estimated.end());
  return trace;
}

/// Begin and end of a block as one event each, in the order of time: {time, block, is begin}.
struct BlockEvent {
  int64_t time;
  size_t block;
  bool begins;
};
inline std::vector<BlockEvent> block_events(const MemoryTrace& trace) {
  std::vector<BlockEvent> events;
  events.reserve(2 * trace.blocks.size());
  for (size_t i = 0; i < trace.blocks.size(); ++i) {
    events.push_back({trace.blocks[i].begin, i, true});
    if (trace.blocks[i].end != MemoryTrace::kForever) events.push_back({trace.blocks[i].end, i, false});
  }
  std::sort(events.begin(), events.end(), [](const auto& a, const auto& b) { return a.time < b.time; });
  return events;
}

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

}  // namespace detail

/// What `step` will need on `device`, found by replaying it without memory and without arithmetic: every allocation and
/// release, in the order of the real step. For the CPU of this machine the peak is that of a MemoryMeter, byte for byte
/// for headroom's modules.
///
/// `step` builds everything it uses, modules included: what it makes has no data. It may name what it does by Phase and
/// its modules by name_modules(). A module that exists stays as it is: plan `module.clone()`.
///
///     const Plan plan = headroom::plan([] {
///       Net net;
///       name_modules(*net);
///       torch::optim::AdamW optimizer(net->parameters());
///       for (int step = 0; step < 2; ++step) {  // the optimizer's state comes with the first step
///         optimizer.zero_grad();
///         net->forward(torch::randn({8, 2, 44100})).square().mean().backward();
///         const Phase phase("optimizer");
///         optimizer.step();
///       }
///     }, device_profile("rtx-4090-24gb"));
///
/// Throws headroom.memory.plan.operator for an operator without a shape kernel, .values for a step that reads data, and
/// .budget for a budget that the parameters alone exceed. Nothing global is different afterwards, also when it throws.
/// Threads may plan at once, and while others compute; each sees its own step.
template <std::invocable Step>
Plan plan(Step&& step, const DeviceProfile& device, const PlanOptions& options = {}) {
  const int64_t room = options.budget.value_or(device.usable_bytes());
  require(room > 0, "headroom.memory.plan.budget", "the budget is ", room, " bytes, expected more than 0");
  int64_t values_read = 0;
  MemoryTrace trace = detail::dry_trace(std::forward<Step>(step), device.device(), options.value, values_read);
  Plan result = detail::analyse(std::move(trace), device, options.budget);
  result.values_read = values_read;
  int64_t parameters = 0;
  for (const auto& block : result.trace.blocks) {
    if (block.use == MemoryUse::parameter) parameters += block.bytes;
  }
  require(parameters <= room, "headroom.memory.plan.budget", "the parameters alone take ", format_bytes(parameters),
          " and the budget is ", format_bytes(room), "; no step of this model fits, choose a smaller one");
  return result;
}

/// The memory of real code on this machine's CPU, in the form of a plan.
template <std::invocable Step>
Plan measure_trace(Step&& step) {
  TraceRecorder recorder;
  std::invoke(std::forward<Step>(step));
  return detail::analyse(recorder.finish(), this_machine(), std::nullopt);
}

}  // namespace headroom::inline v0
