#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/json_string.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0 {

namespace detail {

inline std::string json_block(const Plan& plan, const MemoryTrace::Block& block) {
  std::ostringstream out;
  out << "{\"bytes\": " << block.bytes << ", \"shape\": [";
  const at::IntArrayRef shape = shape_of(block);
  for (size_t i = 0; i < shape.size(); ++i) out << (i == 0 ? "" : ", ") << shape[i];
  out << "], \"dtype\": " << core::detail::json_string(c10::toString(block.dtype))
      << ", \"module\": " << core::detail::json_string(plan.module_of(block))
      << ", \"operator\": " << core::detail::json_string(plan.operator_of(block))
      << ", \"phase\": " << core::detail::json_string(plan.phase_of(block))
      << ", \"use\": " << core::detail::json_string(kMemoryUseNames[static_cast<size_t>(block.use)]) << "}";
  return out.str();
}

}  // namespace detail

/// The plan as a JSON document.
HEADROOM_KERNEL std::string plan_json(const Plan& plan);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL std::string plan_json(const Plan& plan) {
  std::ostringstream out;
  const auto table = [&](const char* name, const auto& rows) {
    out << "  \"" << name << "\": {";
    bool first = true;
    for (const auto& [key, value] : rows) {
      out << (std::exchange(first, false) ? "" : ", ") << core::detail::json_string(key) << ": "
          << std::setprecision(17) << value;
    }
    out << "},\n";
  };
  out << "{\n  \"device\": " << core::detail::json_string(plan.device.name) << ",\n  \"budget_bytes\": " << plan.budget
      << ",\n  \"fits\": " << (plan.fits ? "true" : "false") << ",\n  \"peak_bytes\": " << plan.peak_bytes
      << ",\n  \"reserved_bytes\": " << plan.reserved_bytes << ",\n  \"occupied_bytes\": " << plan.occupied_bytes()
      << ",\n  \"flops\": " << std::setprecision(17) << plan.flops << ",\n";
  std::vector<std::pair<std::string, int64_t>> parts;
  for (size_t use = 0; use < plan.parts.size(); ++use) parts.emplace_back(kMemoryUseNames[use], plan.parts[use]);
  out << "  \"estimated\": [";
  for (size_t i = 0; i < plan.estimated.size(); ++i) {
    out << (i == 0 ? "" : ", ") << core::detail::json_string(plan.estimated[i]);
  }
  out << "],\n";
  table("parts", parts);
  table("by_phase", plan.by_phase);
  table("by_module", plan.by_module);
  table("by_operator", plan.by_operator);
  table("flops_by_operator", plan.flops_by_operator);
  table("flops_by_phase", plan.flops_by_phase);
  out << "  \"largest_at_peak\": [";
  for (size_t i = 0; i < std::min<size_t>(plan.at_peak.size(), 10); ++i) {
    out << (i == 0 ? "\n    " : ",\n    ") << detail::json_block(plan, plan.trace.blocks[plan.at_peak[i]]);
  }
  out << "\n  ],\n";
  if (plan.first_over) {
    out << "  \"out_of_memory\": " << detail::json_block(plan, plan.trace.blocks[*plan.first_over]) << ",\n";
  }
  out << "  \"largest_allocation\": "
      << (plan.largest_block() != nullptr ? detail::json_block(plan, *plan.largest_block()) : "null") << "\n}\n";
  return out.str();
}
#endif

/// Writes the plan as a trace that Perfetto (ui.perfetto.dev) opens: operators, and counters of live bytes by use. A
/// microsecond is an event. About 150 bytes an operator and as many for each allocation and release.
HEADROOM_KERNEL void write_plan_trace(std::ostream& out, const Plan& plan);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL void write_plan_trace(std::ostream& out, const Plan& plan) {
  out << "{\"displayTimeUnit\": \"ns\", \"traceEvents\": [\n"
      << R"({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "plan"}})";
  for (const auto& op : plan.trace.operators) {
    const int64_t end = op.end == MemoryTrace::kForever ? plan.trace.events : op.end;
    const auto name_of = [&](int32_t name) {
      return core::detail::json_string(name < 0 ? std::string() : plan.trace.names[static_cast<size_t>(name)]);
    };
    out << ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": 1, \"ts\": " << op.begin << ", \"dur\": " << end - op.begin
        << ", \"name\": " << name_of(op.name) << ", \"cat\": " << name_of(op.phase)
        << ", \"args\": {\"module\": " << name_of(op.module) << "}}";
  }
  std::array<int64_t, kMemoryUses> live{};
  for (const auto& event : detail::block_events(plan.trace)) {
    const auto& block = plan.trace.blocks[event.block];
    live[static_cast<size_t>(block.use)] += event.begins ? block.bytes : -block.bytes;
    out << ",\n{\"ph\": \"C\", \"pid\": 1, \"ts\": " << event.time << ", \"name\": \"bytes\", \"args\": {";
    for (size_t use = 0; use < live.size(); ++use) {
      out << (use == 0 ? "" : ", ") << core::detail::json_string(kMemoryUseNames[use]) << ": " << live[use];
    }
    out << "}}";
  }
  out << "\n]}\n";
}
#endif

}  // namespace headroom::inline v0
