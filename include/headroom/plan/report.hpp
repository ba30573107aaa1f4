#pragma once

#include <ATen/core/Formatting.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/separate_kernels.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0 {

namespace detail {

/// Sizes without leading ones: what a batch of one adds.
inline at::IntArrayRef shape_of(const MemoryTrace::Block& block) {
  at::IntArrayRef shape(block.shape);
  while (shape.size() > 1 && shape.front() == 1) shape = shape.slice(1);
  return shape;
}

/// The largest entries of a table, largest first.
template <class Value>
std::vector<std::pair<std::string, Value>> largest_first(const std::map<std::string, Value>& table, size_t count) {
  std::vector<std::pair<std::string, Value>> rows(table.begin(), table.end());
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  if (rows.size() > count) rows.resize(count);
  return rows;
}

inline std::string named(const std::string& module) { return module.empty() ? "(outside of modules)" : module; }

/// "80.89 GiB [431, 12, 2049, 2049] in encoder.layers.0.frequency.attention by aten::matmul".
inline std::string block_text(const Plan& plan, const MemoryTrace::Block& block) {
  std::ostringstream out;
  out << format_bytes(block.bytes) << " " << shape_of(block) << " in " << named(plan.module_of(block)) << " by "
      << plan.operator_of(block) << " (" << plan.phase_of(block) << ")";
  return out.str();
}

inline std::string scaled_flops(double flops) {
  constexpr std::array units{" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"};
  size_t unit = 0;
  while (flops >= 1000 && unit + 1 < units.size()) {
    flops /= 1000;
    ++unit;
  }
  std::ostringstream out;
  out << std::setprecision(3) << flops << units[unit];
  return out.str();
}

}  // namespace detail

/// The plan as a table for people.
HEADROOM_KERNEL void print_plan(std::ostream& out, const Plan& plan);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL void print_plan(std::ostream& out, const Plan& plan) {
  const auto row = [&](std::string_view name, int64_t bytes) {
    out << "  " << std::left << std::setw(40) << name << std::right << std::setw(12) << format_bytes(bytes) << "\n";
  };
  out << plan.device.name << ": " << format_bytes(plan.device.total_bytes) << ", " << format_bytes(plan.budget)
      << " for tensors\n"
      << (plan.fits ? "fits" : "does not fit") << ": peak " << format_bytes(plan.peak_bytes) << " (" << plan.peak_bytes
      << " bytes), reserved " << format_bytes(plan.reserved_bytes);
  if (plan.fits) {
    out << ", headroom " << format_bytes(plan.budget - plan.reserved_bytes);
  }
  out << "\nwith libraries and context about " << format_bytes(plan.occupied_bytes());
  out << "\n" << detail::scaled_flops(plan.flops);
  if (plan.device.flops_per_second > 0) {
    out << ", at least " << std::setprecision(3) << plan.flops / plan.device.flops_per_second << " s";
  }
  if (!plan.estimated.empty()) {
    out << "\nan estimate: the CPU's library chooses what it needs in";
    for (const std::string& name : plan.estimated) out << " " << name;
  }
  out << "\nthe peak is made of\n";
  for (size_t use = 0; use < plan.parts.size(); ++use) row(kMemoryUseNames[use], plan.parts[use]);
  out << "highest while\n";
  for (const auto& [phase, bytes] : plan.by_phase) row(phase, bytes);
  out << "who holds the peak\n";
  for (const auto& [module, bytes] : detail::largest_first(plan.by_module, 8)) row(detail::named(module), bytes);
  out << "the largest tensors at the peak\n";
  for (size_t i = 0; i < std::min<size_t>(plan.at_peak.size(), 5); ++i) {
    out << "  " << detail::block_text(plan, plan.trace.blocks[plan.at_peak[i]]) << "\n";
  }
  if (const auto* largest = plan.largest_block(); largest != nullptr) {
    out << "the largest of all\n  " << detail::block_text(plan, *largest) << "\n";
  }
}
#endif

/// Why a plan does not fit: what asks for memory that is not there, and who holds the rest. Empty when it fits.
HEADROOM_KERNEL std::string explain(const Plan& plan);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL std::string explain(const Plan& plan) {
  if (plan.fits) return {};
  const auto& blocks = plan.trace.blocks;
  const MemoryTrace::Block& asks = blocks[*plan.first_over];
  std::map<std::string, int64_t> holders;
  int64_t live = 0;
  for (const auto& block : blocks) {
    if (block.begin >= asks.begin || block.end <= asks.begin) continue;
    live += block.bytes;
    holders[detail::named(plan.module_of(block)) + ", " +
            std::string(kMemoryUseNames[static_cast<size_t>(block.use)])] += block.bytes;
  }
  std::ostringstream out;
  out << "out of memory: " << detail::block_text(plan, asks) << "\n"
      << format_bytes(live) << " of " << format_bytes(plan.budget) << " are held then, most of it by\n";
  for (const auto& [name, bytes] : detail::largest_first(holders, 4)) {
    out << "  " << format_bytes(bytes) << "  " << name << "\n";
  }
  out << "with room for everything the peak would be " << format_bytes(plan.peak_bytes) << "\n";
  return out.str();
}
#endif

}  // namespace headroom::inline v0
