#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

namespace detail {

/// Figures as PyTorch prints them: six digits and a unit that is chosen by another figure.
struct SummaryFigure {
  int step;  ///< from unit to unit
  int width;
  std::vector<const char*> units;

  std::string operator()(int64_t value, int64_t reference) const {
    auto scale = static_cast<double>(reference);
    size_t unit = 0;
    for (; scale >= 0.75 * step * step && unit + 1 < units.size(); ++unit) {
      value /= step;
      scale /= step;
    }
    std::array<char, 48> text{};
    std::snprintf(text.data(), text.size(), "%*lld %s", width, static_cast<long long>(value), units[unit]);
    return text.data();
  }
};

}  // namespace detail

/// What torch.cuda.memory_summary prints, from the statistics that every caching allocator of LibTorch keeps: current,
/// peak, and what was ever allocated and freed, of bytes and of numbers, by pool.
///
///     std::cout << memory_summary(MemoryMeter(torch::kCUDA));
inline std::string memory_summary(const c10::CachingDeviceAllocator::DeviceStats& stats, c10::Device device) {
  using c10::CachingAllocator::Stat;
  using c10::CachingAllocator::StatArray;
  using c10::CachingAllocator::StatType;
  const detail::SummaryFigure size{1024, 6, {"B  ", "KiB", "MiB", "GiB", "TiB", "PiB"}},
      count{1000, 7, {"  ", "K ", "M "}};
  std::ostringstream out;
  const auto line = [&](const std::string& text) { out << "|" << text << std::string(75 - text.size(), ' ') << "|\n"; };
  const auto rule = [&](char c) { out << "|" << std::string(75, c) << "|\n"; };
  const auto row = [&](std::string name, const Stat& s, const Stat& reference, const detail::SummaryFigure& format) {
    name.resize(21, ' ');
    line(" " + name + " | " + format(s.current, reference.current) + " | " + format(s.peak, reference.peak) + " | " +
         format(s.allocated, reference.allocated) + " | " + format(s.freed, reference.freed) + " ");
  };
  const auto rows = [&](const char* name, const StatArray& array, const detail::SummaryFigure& format) {
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
  rows("Allocated memory", stats.allocated_bytes, size);
  rows("Active memory", stats.active_bytes, size);
  rows("Requested memory", stats.requested_bytes, size);
  rows("Reserved memory", stats.reserved_bytes, size);
  rows("Non-releasable memory", stats.inactive_split_bytes, size);
  rows("Allocations", stats.allocation, count);
  rows("Active allocs", stats.active, count);
  rows("Reserved segments", stats.segment, count);
  rows("Non-releasable allocs", stats.inactive_split, count);
  rule('-');
  row("Oversize allocations", stats.oversize_allocations, stats.oversize_allocations, count);
  rule('-');
  row("Oversize segments", stats.oversize_segments, stats.oversize_segments, count);
  rule('=');
  return out.str();
}

/// The same of a meter's device; peaks are the meter's. The CPU keeps nothing in reserve and has no pools.
inline std::string memory_summary(const MemoryMeter& meter) {
  return memory_summary(meter.statistics(), meter.device());
}

}  // namespace headroom::inline v0
