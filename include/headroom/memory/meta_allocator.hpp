#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/StorageImpl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "headroom/memory/counting_allocator.hpp"

namespace headroom::inline v0::detail {

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

}  // namespace headroom::inline v0::detail
