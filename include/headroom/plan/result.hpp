#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headroom/plan/device_profile.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0 {

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
  /// The largest of all blocks; nullptr where there are none.
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
  /// The phase in which it was allocated, such as "forward".
  const std::string& phase_of(const Block& block) const { return trace.names[static_cast<size_t>(block.phase)]; }
};

}  // namespace headroom::inline v0
