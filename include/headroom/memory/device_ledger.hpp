#pragma once

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// An accelerator's own statistics. They know a single peak for everybody: before it is reset, every open window takes
/// its share.
class DeviceLedger final : public MemoryLedger {
 public:
  DeviceLedger(c10::DeviceAllocator& allocator, c10::DeviceIndex index) : allocator_(allocator), index_(index) {}

  /// The ledger of `device`; throws when the device is not there.
  static DeviceLedger& instance(c10::Device device) {
    static auto& ledgers = *new std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, DeviceLedger>;
    static std::mutex mutex;
    c10::DeviceAllocator& allocator = allocator_of(device);
    const auto index = device.has_index() ? device.index() : at::accelerator::getDeviceIndex();
    const std::scoped_lock lock(mutex);
    return ledgers.try_emplace({device.type(), index}, allocator, index).first->second;
  }

  void open(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    windows_.push_back(&window);
    begin(window);
  }

  void close(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    std::erase(windows_, &window);
  }

  void restart(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    begin(window);
  }

  MeterWindow read(const MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    const auto stats = allocator_.getDeviceStats(index_);
    return {.peak = std::max(window.peak, stats.allocated_bytes[0].peak),
            .allocations = stats.allocation[0].allocated - window.allocations};
  }

  std::int64_t live() override { return allocator_.getDeviceStats(index_).allocated_bytes[0].current; }
  std::int64_t reserved() override { return allocator_.getDeviceStats(index_).reserved_bytes[0].current; }
  c10::CachingDeviceAllocator::DeviceStats statistics() override { return allocator_.getDeviceStats(index_); }
  bool sees_single_allocations() const override { return false; }

 private:
  static c10::DeviceAllocator& allocator_of(c10::Device device) {
    c10::DeviceAllocator* allocator = nullptr;
    try {
      allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
      if (allocator != nullptr && !allocator->initialized()) {
        at::globalContext().lazyInitDevice(device.type());
      }
    } catch (const c10::Error& error) {
      fail("headroom.memory.device", "cannot meter ", device.str(), ": ", error.what_without_backtrace(),
           "; use a LibTorch built for this device on a machine that has it, or meter the CPU");
    }
    require(allocator != nullptr, "headroom.memory.device", "cannot meter ", device.str(),
            ": its allocator keeps no statistics; meter the CPU or an accelerator with a caching allocator");
    return *allocator;
  }

  /// Here `allocations` holds the device's count when the window began.
  void begin(MeterWindow& window) {
    const auto stats = allocator_.getDeviceStats(index_);
    for (MeterWindow* other : windows_) {
      other->peak = std::max(other->peak, stats.allocated_bytes[0].peak);
    }
    allocator_.resetPeakStats(index_);
    window.peak = stats.allocated_bytes[0].current;
    window.allocations = stats.allocation[0].allocated;
  }

  c10::DeviceAllocator& allocator_;
  c10::DeviceIndex index_;
};

}  // namespace headroom::inline v0::detail
