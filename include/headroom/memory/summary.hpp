#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>

#include "headroom/memory/meter.hpp"

namespace headroom::inline v0 {

namespace detail {

/// One figure as PyTorch prints it: six digits and a unit that is chosen by `reference`.
inline std::string summary_size(int64_t value, int64_t reference) {
  constexpr std::array units{"B  ", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  for (auto scale = static_cast<double>(reference); scale >= 768 * 1024 && unit + 1 < units.size(); ++unit) {
    value /= 1024;
    scale /= 1024;
  }
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%6lld %s", static_cast<long long>(value), units[unit]);
  return text.data();
}
inline std::string summary_count(int64_t value, int64_t reference) {
  constexpr std::array units{" ", "K", "M"};
  size_t unit = 0;
  for (auto scale = static_cast<double>(reference); scale >= 750 * 1000 && unit + 1 < units.size(); ++unit) {
    value /= 1000;
    scale /= 1000;
  }
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%7lld %s ", static_cast<long long>(value), units[unit]);
  return text.data();
}

}  // namespace detail

/// What torch.cuda.memory_summary prints, from the statistics that every caching allocator of LibTorch keeps: current,
/// peak, and what was ever allocated and freed, of bytes and of numbers, by pool.
///
///     std::cout << memory_summary(MemoryMeter(torch::kCUDA));
inline std::string memory_summary(const c10::CachingDeviceAllocator::DeviceStats& stats, c10::Device device) {
  using c10::CachingAllocator::Stat;
  using c10::CachingAllocator::StatArray;
  using c10::CachingAllocator::StatType;
  std::ostringstream out;
  const auto line = [&](const std::string& text) { out << "|" << text << std::string(75 - text.size(), ' ') << "|\n"; };
  const auto rule = [&](char c) { out << "|" << std::string(75, c) << "|\n"; };
  const auto row = [&](std::string name, const Stat& s, const Stat& reference, const auto& format) {
    name.resize(21, ' ');
    line(" " + name + " | " + format(s.current, reference.current) + " | " + format(s.peak, reference.peak) + " | " +
         format(s.allocated, reference.allocated) + " | " + format(s.freed, reference.freed) + " ");
  };
  const auto rows = [&](const char* name, const StatArray& array, const auto& format) {
    const auto of = [&](StatType type) -> const Stat& { return array[static_cast<size_t>(type)]; };
    rule('-');
    row(name, of(StatType::AGGREGATE), of(StatType::AGGREGATE), format);
    row("      from large pool", of(StatType::LARGE_POOL), of(StatType::AGGREGATE), format);
    row("      from small pool", of(StatType::SMALL_POOL), of(StatType::AGGREGATE), format);
  };
  rule('=');
  line(std::string(18, ' ') + "LibTorch " + c10::DeviceTypeName(device.type()) + " memory summary, device ID " +
       std::to_string(device.has_index() ? device.index() : 0));
  rule('-');
  line("           OOMs: " + std::to_string(stats.num_ooms) +
       "   |   allocations repeated after freeing the cache: " + std::to_string(stats.num_alloc_retries));
  rule('=');
  line("        Metric         | Cur Usage  | Peak Usage | Tot Alloc  | Tot Freed  ");
  rows("Allocated memory", stats.allocated_bytes, detail::summary_size);
  rows("Active memory", stats.active_bytes, detail::summary_size);
  rows("Requested memory", stats.requested_bytes, detail::summary_size);
  rows("Reserved memory", stats.reserved_bytes, detail::summary_size);
  rows("Non-releasable memory", stats.inactive_split_bytes, detail::summary_size);
  rows("Allocations", stats.allocation, detail::summary_count);
  rows("Active allocs", stats.active, detail::summary_count);
  rows("Reserved segments", stats.segment, detail::summary_count);
  rows("Non-releasable allocs", stats.inactive_split, detail::summary_count);
  rule('-');
  row("Oversize allocations", stats.oversize_allocations, stats.oversize_allocations, detail::summary_count);
  rule('-');
  row("Oversize segments", stats.oversize_segments, stats.oversize_segments, detail::summary_count);
  rule('=');
  return out.str();
}

/// The same of a meter's device; peaks are the meter's. The CPU keeps nothing in reserve and has no pools.
inline std::string memory_summary(const MemoryMeter& meter) {
  return memory_summary(meter.statistics(), meter.device());
}

}  // namespace headroom::inline v0
