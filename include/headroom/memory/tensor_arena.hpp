#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

namespace headroom::inline v0 {

/// The main memory of large tensors, kept from one step or segment to the next. What malloc does with them is one of
/// two: give their pages back at once, so that each tensor is made of fresh ones, whose clearing takes a tenth to a
/// fifth of a step on the CPU; or keep them in a heap with everything else, where holes let a long run grow. Here a
/// large tensor takes the first free range, from the highest address down, that holds it; ranges that are freed side by
/// side become one. A step that needs what the one before it needed so finds the same pages.
///
/// Tensors below kLeast bytes stay with the allocator that was there before. Pages go back to the system when
/// release_free_pages() is called; until then resident stays what one step needed at its highest.
class TensorArena final : public c10::Allocator {
 public:
  static constexpr std::size_t kLeast = 1 << 19;

  /// Never destroyed: storages may be freed during static destruction.
  static TensorArena& instance() {
    static auto* const arena = new TensorArena;
    return *arena;
  }

  /// From now on CPU tensors come from here. Call it before the first MemoryMeter and before tensors are made by
  /// several threads.
  static void install() {
    if (c10::GetAllocator(c10::kCPU) != &instance()) c10::SetAllocator(c10::kCPU, &instance());
  }

  /// Bytes taken from the system, of which live tensors and free ranges are made.
  std::int64_t reserved() const {
    const std::scoped_lock lock(mutex_);
    return static_cast<std::int64_t>(reserved_);
  }

  /// Gives the pages of free ranges back to the system, and those that glibc's malloc keeps for later.
  void release_free_pages() {
    const std::scoped_lock lock(mutex_);
    for (const auto& [begin, size] : free_) ::madvise(begin, size, MADV_DONTNEED);
#ifdef __GLIBC__
    ::malloc_trim(0);
#endif
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    void* data = bytes < kLeast ? nullptr : take(bytes);
    if (data == nullptr) data = below_->raw_allocate(bytes);  // which also says that memory has run out
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

 private:
  static constexpr std::size_t kPage = 4096, kGrowth = 128 << 20;  // bytes; what is not touched is not resident

  TensorArena() : below_(c10::GetAllocator(c10::kCPU)) {}

  static void release(void* data) {
    if (data != nullptr && !instance().give_back(data)) instance().below_->raw_deallocate(data);
  }

  using Ranges = std::map<std::byte*, std::size_t>;  // by address

  /// nullptr when the system has no more.
  void* take(std::size_t bytes) {
    if (bytes > std::numeric_limits<std::size_t>::max() / 2) return nullptr;
    const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::scoped_lock lock(mutex_);
    auto range = highest_that_holds(size);
    if (range == free_.end()) {
      if (!grow(std::max(size, kGrowth)) && !grow(size)) return nullptr;
      range = highest_that_holds(size);
    }
    if (range->second == size) return taken_.insert(free_.extract(range)).position->first;
    std::byte* const begin = range->first + (range->second - size);
    taken_.emplace(begin, size);
    range->second -= size;
    return begin;
  }

  /// False for what is not from here. Allocates nothing: deleters must not throw.
  bool give_back(void* data) {
    if (reinterpret_cast<std::uintptr_t>(data) % kPage != 0) return false;  // ranges begin at a page
    const std::scoped_lock lock(mutex_);
    const auto taken = taken_.find(static_cast<std::byte*>(data));
    if (taken == taken_.end()) return false;
    add_free(taken_.extract(taken));
    return true;
  }

  /// What was there first lies highest.
  Ranges::iterator highest_that_holds(std::size_t size) {
    auto range = free_.end();
    while (range != free_.begin()) {
      if ((--range)->second >= size) return range;
    }
    return free_.end();
  }

  bool grow(std::size_t bytes) {
    Ranges fresh{{nullptr, bytes}};
    // Where Linux grows to, if it is free: a wish, not a place in memory of ours
    const auto lowest = reinterpret_cast<std::uintptr_t>(lowest_);
    void* const below = reinterpret_cast<void*>(lowest > bytes ? lowest - bytes : 0);
    void* const begin = ::mmap(below, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) return false;
    lowest_ = static_cast<std::byte*>(begin);
    reserved_ += bytes;
    auto range = fresh.extract(fresh.begin());
    range.key() = lowest_;
    add_free(std::move(range));
    return true;
  }

  void add_free(Ranges::node_type range) {
    auto next = free_.lower_bound(range.key());
    if (next != free_.end() && range.key() + range.mapped() == next->first) {
      range.mapped() += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == range.key()) {
        before->second += range.mapped();
        return;
      }
    }
    free_.insert(next, std::move(range));
  }

  c10::Allocator* const below_;
  mutable std::mutex mutex_;
  Ranges free_;  ///< none beside another
  Ranges taken_;
  std::byte* lowest_ = nullptr;  ///< where the last growth begins
  std::size_t reserved_ = 0;
};

}  // namespace headroom::inline v0
