#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// An allocator that takes the place of a device type's own while a window is open, and keeps books.
class CountingLedger : public c10::Allocator, public MemoryLedger {
 public:
  void open(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    windows_.reserve(windows_.size() + 1);
    if (windows_.empty()) {
      underlying_ = c10::GetAllocator(type_);
      c10::SetAllocator(type_, this);
      require(c10::GetAllocator(type_) == this, "headroom.memory.allocator", "another ", c10::DeviceTypeName(type_),
              " allocator was installed with a priority above 0 and cannot be replaced; "
              "install it with priority 0 or measure without it");
    }
    windows_.push_back(&window);
    window.peak = live_;
  }

  void close(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    std::erase(windows_, &window);
    if (windows_.empty() && c10::GetAllocator(type_) == this) {
      c10::SetAllocator(type_, underlying_);
    }
  }

  void restart(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    window = {.peak = live_, .limit = window.limit, .spared = window.spared, .listener = window.listener};
  }

  MeterWindow read(const MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
    return window;
  }

  std::int64_t live() override {
    const std::scoped_lock lock(mutex_);
    return live_;
  }

  std::int64_t reserved() override { return live(); }
  c10::CachingDeviceAllocator::DeviceStats statistics() override {
    const std::scoped_lock lock(mutex_);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* const array :
         {&stats.allocated_bytes, &stats.active_bytes, &stats.requested_bytes, &stats.reserved_bytes}) {
      (*array)[0] = bytes_;
    }
    for (auto* const array : {&stats.allocation, &stats.active, &stats.segment}) (*array)[0] = blocks_;
    return stats;
  }
  bool sees_single_allocations() const override { return true; }

 protected:
  explicit CountingLedger(c10::DeviceType type) : type_(type) {}

  // All with mutex_ held.

  /// Throws c10::OutOfMemoryError when `bytes` more would break a limit, or when this allocation was told to fail.
  void check_limits(std::int64_t bytes) {
    for (MeterWindow* window : windows_) {
      TORCH_CHECK_WITH(OutOfMemoryError, window->spared-- != 0, "[headroom.memory.limit] ", c10::DeviceTypeName(type_),
                       " out of memory: tried to allocate ", format_bytes(bytes), " with ", format_bytes(live_),
                       " live; MemoryMeter::fail_allocation let this allocation fail");
      TORCH_CHECK_WITH(OutOfMemoryError, bytes <= window->limit - live_, "[headroom.memory.limit] ",
                       c10::DeviceTypeName(type_), " out of memory: tried to allocate ", format_bytes(bytes), " with ",
                       format_bytes(live_), " live under a limit of ", format_bytes(window->limit),
                       "; make the step smaller or raise MemoryMeter::set_limit");
    }
  }
  void add(const void* block, std::int64_t bytes) {
    live_ += bytes;
    bytes_.increase(static_cast<std::size_t>(bytes));
    blocks_.increase(1);
    for (MeterWindow* window : windows_) {
      window->peak = std::max(window->peak, live_);
      window->largest = std::max(window->largest, bytes);
      ++window->allocations;
      if (window->listener != nullptr) window->listener->allocated(block, bytes);
    }
  }
  void remove(const void* block, std::int64_t bytes) {
    live_ -= bytes;
    bytes_.decrease(static_cast<std::size_t>(bytes));
    blocks_.decrease(1);
    for (MeterWindow* window : windows_) {
      if (window->listener != nullptr) window->listener->freed(block);
    }
  }

  c10::Allocator* underlying_ = nullptr;

 private:
  c10::DeviceType type_;
  std::int64_t live_ = 0;
  c10::CachingAllocator::Stat bytes_, blocks_;  // as c10::DeviceAllocator keeps them
};

/// LibTorch's CPU allocator with a ledger around it. The memory itself comes from the allocator that was there before
/// and goes back to it; sizes live in a table by address. A header in front of the data would be cheaper, but oneDNN
/// frees raw pointers through whichever allocator is installed at that time, so a pointer must stay valid for both.
class CountingAllocator final : public CountingLedger {
 public:
  /// Never destroyed: storages may be freed during static destruction.
  static CountingAllocator& instance() {
    static auto* allocator = new CountingAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    }
    const auto size = static_cast<std::int64_t>(bytes);
    if (aside_ != nullptr) {
      void* const data = underlying_->raw_allocate(bytes);
      c10::DataPtr block(data, data, &release, c10::Device(c10::kCPU));
      aside_->allocated(data, size);
      return block;
    }
    const std::scoped_lock lock(mutex_);
    check_limits(size);
    void* data = underlying_->raw_allocate(bytes);
    // An address that is still listed was freed behind our back, by the underlying allocator's raw_deallocate
    if (const auto known = sizes_.find(data); known != sizes_.end()) {
      remove(data, known->second);
    }
    try {
      sizes_[data] = size;
    } catch (...) {
      underlying_->raw_deallocate(data);
      throw;
    }
    add(data, size);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  /// From now on what this thread allocates while a window is open is told to `listener` alone, without a lock, and not
  /// counted; nullptr ends that. allocated() may throw: the allocation fails. Returns the listener before.
  static AllocationListener* set_aside(AllocationListener* listener) { return std::exchange(aside_, listener); }

 private:
  CountingAllocator() : CountingLedger(c10::kCPU) {}

  static void release(void* data) { instance().free(data); }

  void free(void* data) {
    if (data == nullptr) {
      return;
    }
    if (aside_ != nullptr) aside_->freed(data);
    {
      // Unlist first: once freed, another thread may get the same address
      const std::scoped_lock lock(mutex_);
      if (const auto entry = sizes_.find(data); entry != sizes_.end()) {
        remove(data, entry->second);
        sizes_.erase(entry);
      }
    }
    underlying_->raw_deallocate(data);
  }

  static inline thread_local AllocationListener* aside_ = nullptr;

  std::unordered_map<void*, std::int64_t> sizes_;
};

}  // namespace headroom::inline v0::detail
