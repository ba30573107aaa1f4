#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// Hears of every allocation and release, with the ledger locked: it must not allocate tensors. `block` is the context
/// of the DataPtr, by which a storage is recognised. Releases of blocks that it never heard of occur.
class AllocationListener {
 public:
  virtual ~AllocationListener() = default;
  virtual void allocated(const void* block, std::int64_t bytes) = 0;
  virtual void freed(const void* block) noexcept = 0;
};

/// One meter's view: what happened since it was opened or restarted.
struct MeterWindow {
  std::int64_t peak = 0;
  std::int64_t allocations = 0;
  std::int64_t largest = 0;
  std::int64_t limit = std::numeric_limits<std::int64_t>::max();
  std::int64_t spared = std::numeric_limits<std::int64_t>::max();  ///< allocations that succeed before one fails
  AllocationListener* listener = nullptr;
};

/// The bookkeeping of one device. Every open window sees every event, so that windows may nest or overlap and
/// restarting one leaves the others alone.
class MemoryLedger {
 public:
  virtual ~MemoryLedger() = default;
  virtual void open(MeterWindow& window) = 0;
  virtual void close(MeterWindow& window) = 0;
  virtual void restart(MeterWindow& window) = 0;
  virtual MeterWindow read(const MeterWindow& window) = 0;
  virtual std::int64_t live() = 0;
  virtual std::int64_t reserved() = 0;
  virtual c10::CachingDeviceAllocator::DeviceStats statistics() = 0;
  /// False: `largest`, `limit` and `spared` of a window mean nothing here.
  virtual bool sees_single_allocations() const = 0;

  void set_limit(MeterWindow& window, std::int64_t bytes) {
    const std::scoped_lock lock(mutex_);
    window.limit = bytes;
  }
  void set_spared(MeterWindow& window, std::int64_t allocations) {
    const std::scoped_lock lock(mutex_);
    window.spared = allocations;
  }

 protected:
  std::mutex mutex_;
  std::vector<MeterWindow*> windows_;
};

}  // namespace headroom::inline v0::detail
