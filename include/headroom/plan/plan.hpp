#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/plan/analysis.hpp"
#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/dry_trace.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0 {

/// What a plan is asked beside the step and the device.
struct PlanOptions {
  /// Bytes that tensors may take; the device's usable bytes unless given.
  std::optional<int64_t> budget = {};
  /// What reading a value gives, as .item() does; unless given, a step that reads one cannot be planned.
  std::optional<double> value = {};
};

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
  Plan result = detail::analyse(detail::dry_trace(std::forward<Step>(step), device.device(), options.value), device,
                                options.budget);
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
