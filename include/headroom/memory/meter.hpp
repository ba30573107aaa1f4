#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/memory/counting_allocator.hpp"
#include "headroom/memory/device_ledger.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/memory/meta_allocator.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// What MemoryMeter::measure saw, in bytes. `peak` is absolute: it contains `live_before`.
struct MemoryReport {
  std::int64_t live_before = 0;
  std::int64_t live_after = 0;
  std::int64_t peak = 0;
  std::int64_t allocations = 0;         ///< number of allocations of at least one byte
  std::optional<std::int64_t> largest;  ///< largest single allocation; accelerators do not tell

  /// Bytes that the measured code needed on top of what was there.
  std::int64_t added_peak() const { return peak - live_before; }
  /// Bytes that outlive the measured code; negative when it freed more than it left.
  std::int64_t held() const { return live_after - live_before; }
};

/// Counts the bytes of tensor storage on one device while it lives.
///
/// On the CPU the first meter puts a counting allocator in front of LibTorch's and the last one takes it away; tensors
/// may be older or younger than the meter and may be freed on any thread. What was allocated before the first meter is
/// not counted, neither when it lives nor when it is freed. On the meta device it counts what the tensors would hold.
/// On an accelerator the meter reads the statistics of the device's caching allocator.
///
/// Meters nest and overlap: each has its own window, and resetting one does not touch another. Install and remove the
/// first and last CPU meter while no other thread allocates (a rule of c10::SetAllocator).
///
///     MemoryMeter meter;
///     const MemoryReport report = meter.measure([&] { loss(model(x)).backward(); });
///     std::cout << format_bytes(report.added_peak());
class MemoryMeter {
 public:
  /// Throws headroom.memory.device when the device is not there or keeps no statistics.
  explicit MemoryMeter(c10::Device device = c10::kCPU) : device_(device), ledger_(ledger_of(device)) {
    ledger_.open(window_);
  }
  ~MemoryMeter() { ledger_.close(window_); }
  MemoryMeter(const MemoryMeter&) = delete;
  MemoryMeter& operator=(const MemoryMeter&) = delete;

  /// The device that is measured.
  c10::Device device() const { return device_; }

  /// Bytes in use now. CPU: allocated while any meter was installed and not freed since.
  std::int64_t live() const { return ledger_.live(); }

  /// Highest live() since construction or reset_peak().
  std::int64_t peak() const { return ledger_.read(window_).peak; }

  /// Number of allocations of at least one byte since construction or reset_peak().
  std::int64_t allocations() const { return ledger_.read(window_).allocations; }

  /// Bytes of the largest single allocation since construction or reset_peak(); CPU only (headroom.memory.unsupported).
  std::int64_t largest() const {
    require_single_allocations("largest");
    return ledger_.read(window_).largest;
  }

  /// Bytes taken from the system: live() on the CPU, live and cached on an accelerator.
  std::int64_t reserved() const { return ledger_.reserved(); }

  /// What LibTorch's allocators for accelerators keep: current, peak, ever allocated and freed, of bytes and numbers.
  /// Peaks are those since construction or reset_peak(); memory_summary() prints it.
  c10::CachingDeviceAllocator::DeviceStats statistics() const {
    auto stats = ledger_.statistics();
    stats.allocated_bytes[0].peak = peak();
    if (ledger_.sees_single_allocations()) {
      stats.active_bytes[0].peak = stats.requested_bytes[0].peak = stats.reserved_bytes[0].peak = peak();
    }
    return stats;
  }

  /// Starts a new window: peak() is live(), allocations() and largest() are 0.
  void reset_peak() { ledger_.restart(window_); }

  /// An allocation that would take live() above `bytes` throws c10::OutOfMemoryError, as a full GPU does. The limit
  /// ends with the meter; std::nullopt lifts it. CPU and meta only (headroom.memory.unsupported).
  void set_limit(std::optional<std::int64_t> bytes) {
    require_single_allocations("set_limit");
    require(bytes.value_or(0) >= 0, "headroom.memory.limit", "got a limit of ", bytes.value_or(0),
            " bytes, expected 0 or more; pass std::nullopt for no limit");
    ledger_.set_limit(window_, bytes.value_or(std::numeric_limits<std::int64_t>::max()));
  }

  /// Of the allocations to come `spared` succeed and the next one throws c10::OutOfMemoryError, once: to see what a
  /// program does when memory runs out just there. CPU and meta only (headroom.memory.unsupported).
  void fail_allocation(std::int64_t spared) {
    require_single_allocations("fail_allocation");
    require(spared >= 0, "headroom.memory.limit", "got ", spared, " allocations to spare, expected 0 or more");
    ledger_.set_spared(window_, spared);
  }

  /// Runs `f` in a window of its own, which leaves this meter's peak() right.
  template <std::invocable F>
  MemoryReport measure(F&& f) const {
    const MemoryMeter inner(device_);
    const std::int64_t before = inner.live();
    std::invoke(std::forward<F>(f));
    const detail::MeterWindow seen = ledger_.read(inner.window_);
    return {.live_before = before,
            .live_after = inner.live(),
            .peak = seen.peak,
            .allocations = seen.allocations,
            .largest = ledger_.sees_single_allocations() ? std::optional(seen.largest) : std::nullopt};
  }

 private:
  static detail::MemoryLedger& ledger_of(c10::Device device) {
    if (device.is_cpu()) {
      return detail::CountingAllocator::instance();
    }
    if (device.is_meta()) {
      return detail::MetaAllocator::instance();
    }
    return detail::DeviceLedger::instance(device);
  }

  void require_single_allocations(const char* what) const {
    require(ledger_.sees_single_allocations(), "headroom.memory.unsupported", what, " on ", device_.str(),
            ": the device's allocator only keeps sums; use a CPU meter");
  }

  c10::Device device_;
  detail::MemoryLedger& ledger_;
  detail::MeterWindow window_;
};

}  // namespace headroom::inline v0
