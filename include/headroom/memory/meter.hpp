#pragma once

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"

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

namespace detail {

/// Hears of every allocation and release, with the ledger locked: it must not allocate tensors. `block` is the context
/// of the DataPtr, by which a storage is recognised. Releases of blocks that it never heard of occur.
class AllocationListener {
 public:
  virtual ~AllocationListener() = default;
  virtual void allocated(const void* block, std::int64_t bytes) = 0;
  virtual void freed(const void* block) = 0;
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

/// An allocator that takes the place of a device type's own while a window is open, and keeps books.
class CountingLedger : public c10::Allocator, public MemoryLedger {
 public:
  void open(MeterWindow& window) override {
    const std::scoped_lock lock(mutex_);
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
    sizes_[data] = size;
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

/// Counts what tensors without data would hold: an allocator of the meta device, whose own one does not see sizes. It
/// hands out no memory.
class MetaAllocator final : public CountingLedger {
 public:
  /// Never destroyed, like CountingAllocator.
  static MetaAllocator& instance() {
    static auto* allocator = new MetaAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    auto block = std::make_unique<Block>(Block{static_cast<std::int64_t>(bytes)});
    const std::scoped_lock lock(mutex_);
    if (bytes > 0) {
      check_limits(block->bytes);
      add(block.get(), block->bytes);
    }
    return {nullptr, block.release(), &release, c10::Device(c10::kMeta)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, std::size_t) const override {}

  /// To be called after an operator that resized a tensor: on this device it only changes what the storage says.
  void follow_resize(const c10::StorageImpl& storage) {
    if (storage.data_ptr().get_deleter() != &release) {
      return;
    }
    auto* const block = static_cast<Block*>(storage.data_ptr().get_context());
    const auto bytes = static_cast<std::int64_t>(storage.nbytes());
    const std::scoped_lock lock(mutex_);
    if (bytes <= block->bytes) {
      return;
    }
    check_limits(bytes);
    // The old memory is copied from: it goes after the new one came
    const Block old = *block;
    if (old.bytes > 0) {
      add(&old, old.bytes);
      remove(block, old.bytes);
    }
    add(block, bytes);
    if (old.bytes > 0) {
      remove(&old, old.bytes);
    }
    block->bytes = bytes;
  }

 private:
  struct Block {
    std::int64_t bytes;
  };

  MetaAllocator() : CountingLedger(c10::kMeta) {}

  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    MetaAllocator& allocator = instance();
    const std::scoped_lock lock(allocator.mutex_);
    if (block->bytes > 0) {
      allocator.remove(block.get(), block->bytes);
    }
  }
};

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

}  // namespace detail

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
