#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0 {

/// How the caching allocator model gets memory from the device.
struct CachingAllocatorOptions {
  bool expandable_segments = false;  ///< PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  /// Hears of memory that is taken from the device (bytes > 0) or given back (bytes < 0), and where it lies.
  std::function<void(int64_t address, int64_t bytes)> on_segment = {};
};

/// A simulation of LibTorch's caching allocator for CUDA (c10/cuda/CUDACachingAllocator.cpp), on one stream: what it
/// would hold of the device's memory for a sequence of allocations and releases.
///
/// Sizes are rounded up to 512 bytes. Up to 1 MiB comes from the pool of small blocks, whose segments are 2 MiB; more
/// comes from the pool of large ones: segments of 20 MiB for less than 10 MiB, of a multiple of 2 MiB above. The
/// smallest free block that fits is used, and split when more than 512 bytes (small) or 1 MiB (large) would remain;
/// free neighbours merge. Released memory stays reserved until the device is full: then whole free segments go back to
/// it. With expandable segments each pool is one segment that grows by pages of 2 MiB or 20 MiB; that LibTorch would
/// unmap free pages of a full device is not modelled, so that no plan promises too much.
class CachingAllocatorModel {
 public:
  static constexpr int64_t kRound = 512, kSmallest = 1 << 20, kSmallSegment = 2 << 20, kLargeSegment = 20 << 20,
                           kLargeRequest = 10 << 20, kSegmentRound = 2 << 20;

  /// `capacity`: bytes of the device that the allocator may reserve.
  explicit CachingAllocatorModel(int64_t capacity, const CachingAllocatorOptions& options = {})
      : capacity_(capacity), options_(options) {}

  /// Whether `bytes` could be had; `id` names the block until release(). Nothing changes when not.
  bool allocate(int64_t id, int64_t bytes) {
    const int64_t size = rounded(bytes);
    const bool large = size > kSmallest;
    Pool& pool = pools_[large];
    auto found = pool.free.lower_bound({size, 0});
    if (found == pool.free.end()) {
      if (!reserve(pool, size)) return false;
      found = pool.free.lower_bound({size, 0});
    }
    const Place place = found->second;
    pool.free.erase(found);
    const int64_t rest = place->size - size;
    if (large && !options_.expandable_segments ? rest > kSmallest : rest >= kRound) {
      const Place tail = place->segment->blocks.insert(std::next(place), {place->address + size, rest, place->segment});
      place->size = size;
      pool.add_free(tail);
    }
    place->used = true;
    live_[id] = place;
    allocated_ += place->size;
    return true;
  }

  /// Frees a block. Throws headroom.memory.allocator_model for one that is not allocated.
  void release(int64_t id) {
    const auto found = live_.find(id);
    require(found != live_.end(), "headroom.memory.allocator_model", "released block ", id,
            " is not allocated; every block is released once");
    Place place = found->second;
    live_.erase(found);
    allocated_ -= place->size;
    place->used = false;
    auto& blocks = place->segment->blocks;
    Pool& pool = pools_[place->segment->large];
    if (place != blocks.begin() && !std::prev(place)->used) {
      pool.remove_free(--place);
      join_next(place);
    }
    if (std::next(place) != blocks.end() && !std::next(place)->used) {
      pool.remove_free(std::next(place));
      join_next(place);
    }
    pool.add_free(place);
  }

  /// Gives all segments that are wholly free back to the device, as empty_cache() does.
  void empty_cache() {
    for (Pool& pool : pools_) {
      for (auto segment = pool.segments.begin(); segment != pool.segments.end();) {
        segment = give_back(pool, segment) ? pool.segments.erase(segment) : std::next(segment);
      }
    }
  }

  /// Bytes in use, rounded as above.
  int64_t allocated() const { return allocated_; }
  /// Bytes taken from the device, now and at most.
  int64_t reserved() const { return reserved_; }
  int64_t peak_reserved() const { return peak_reserved_; }
  /// The largest block that needs no more memory from the device.
  int64_t largest_free() const {
    int64_t largest = 0;
    for (const Pool& pool : pools_) {
      if (!pool.free.empty()) largest = std::max(largest, pool.free.rbegin()->first.first);
    }
    return largest;
  }

  /// Where a block lies that is allocated.
  int64_t address(int64_t id) const { return live_.at(id)->address; }

  /// A stretch of a segment: a block in use or a gap.
  struct Stretch {
    int64_t address, size;
    std::optional<int64_t> id;  ///< of the block; none: a gap
  };
  /// A piece of the device's memory that the allocator holds, and what lies in it.
  struct SegmentView {
    int64_t address, size;
    bool large;                           ///< belongs to the pool of large blocks
    std::vector<Stretch> stretches = {};  ///< by address, without holes
  };
  /// What is reserved now.
  std::vector<SegmentView> segments() const {
    std::map<int64_t, int64_t> ids;
    for (const auto& [id, place] : live_) ids[place->address] = id;
    std::vector<SegmentView> views;
    for (const Pool& pool : pools_) {
      for (const Segment& segment : pool.segments) {
        SegmentView& view = views.emplace_back(SegmentView{segment.address, segment.size, segment.large});
        for (const Block& block : segment.blocks) {
          view.stretches.push_back(
              {block.address, block.size, block.used ? std::optional(ids.at(block.address)) : std::nullopt});
        }
      }
    }
    return views;
  }

  /// What a block of so many bytes takes.
  static int64_t rounded(int64_t bytes) { return std::max(rounded_up(bytes, kRound), kRound); }

 private:
  struct Segment;
  struct Block {
    int64_t address;
    int64_t size;
    Segment* segment;
    bool used = false;
  };
  using Place = std::list<Block>::iterator;
  struct Segment {
    int64_t address;
    bool large;
    int64_t size = 0;
    std::list<Block> blocks = {};  // by address
  };
  struct Pool {
    std::list<Segment> segments = {};
    std::map<std::pair<int64_t, int64_t>, Place> free = {};  // by size and address
    void add_free(Place place) { free[{place->size, place->address}] = place; }
    void remove_free(Place place) { free.erase({place->size, place->address}); }
  };

  static int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

  /// A block takes in the one behind it.
  static void join_next(Place front) {
    front->size += std::next(front)->size;
    front->segment->blocks.erase(std::next(front));
  }

  /// Takes memory for a block of `size` from the device; gives free segments back when that is full.
  bool reserve(Pool& pool, int64_t size) {
    const bool large = &pool == &pools_[1];
    if (options_.expandable_segments) {
      Segment* const segment = pool.segments.empty() ? nullptr : &pool.segments.front();
      const bool tail_is_free = segment != nullptr && !segment->blocks.back().used;
      const int64_t missing = size - (tail_is_free ? segment->blocks.back().size : 0);
      return grow(pool, rounded_up(missing, large ? kLargeSegment : kSmallSegment), true);
    }
    return grow(pool,
                !large                 ? kSmallSegment
                : size < kLargeRequest ? kLargeSegment
                                       : rounded_up(size, kSegmentRound),
                false);
  }
  /// `bytes` more, in a segment of their own or at the end of the only one.
  bool grow(Pool& pool, int64_t bytes, bool in_place) {
    if (reserved_ + bytes > capacity_ && !in_place) empty_cache();
    if (reserved_ + bytes > capacity_) return false;
    if (!in_place || pool.segments.empty()) {
      pool.segments.push_back({next_address_, &pool == &pools_[1]});
      next_address_ += in_place ? int64_t{1} << 50 : rounded_up(bytes, kSegmentRound);
    }
    Segment& segment = pool.segments.back();
    if (!segment.blocks.empty() && !segment.blocks.back().used) {
      pool.remove_free(std::prev(segment.blocks.end()));
      segment.blocks.back().size += bytes;
    } else {
      segment.blocks.push_back({segment.address + segment.size, bytes, &segment});
    }
    if (options_.on_segment) options_.on_segment(segment.address + segment.size, bytes);
    segment.size += bytes;
    pool.add_free(std::prev(segment.blocks.end()));
    reserved_ += bytes;
    peak_reserved_ = std::max(peak_reserved_, reserved_);
    return true;
  }
  bool give_back(Pool& pool, std::list<Segment>::iterator segment) {
    if (segment->blocks.size() != 1 || segment->blocks.front().used) return false;
    pool.remove_free(segment->blocks.begin());
    reserved_ -= segment->size;
    if (options_.on_segment) options_.on_segment(segment->address, -segment->size);
    return true;
  }

  int64_t capacity_;
  CachingAllocatorOptions options_;
  Pool pools_[2];  // small, large
  std::unordered_map<int64_t, Place> live_;
  int64_t next_address_ = kSegmentRound;
  int64_t allocated_ = 0, reserved_ = 0, peak_reserved_ = 0;
};

}  // namespace headroom::inline v0
