#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/separate_kernels.hpp"
#include "headroom/plan/allocator_model.hpp"
#include "headroom/plan/plan.hpp"

namespace headroom::inline v0 {

namespace detail {

using Dictionary = c10::impl::GenericDict;
using List = c10::impl::GenericList;

inline Dictionary dictionary(std::initializer_list<std::pair<const char*, c10::IValue>> entries) {
  Dictionary result(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [key, value] : entries) result.insert(std::string(key), value);
  return result;
}
inline List list() { return List(c10::AnyType::get()); }

/// Writes a plan down as the caching allocator for CUDA would have recorded it.
class SnapshotWriter {
 public:
  SnapshotWriter(const Plan& plan, int64_t until)
      : plan_(plan),
        until_(until),
        allocator_(plan.fits ? plan.budget : std::numeric_limits<int64_t>::max() / 2,
                   {.expandable_segments = plan.device.expandable_segments,
                    .on_segment = [this](int64_t address, int64_t bytes) {
                      add(bytes > 0 ? "segment_alloc" : "segment_free", address, std::abs(bytes), list());
                    }}) {}

  std::string write() {
    replay();
    std::string text;
    torch::jit::Pickler pickler([&](const char* data, size_t size) { text.append(data, size); }, nullptr, nullptr,
                                nullptr, nullptr, /*tag_aggregates=*/false);
    List traces = list();
    traces.push_back(trace_);
    pickler.protocol();
    pickler.pushIValue(
        dictionary({{"segments", segments()},
                    {"device_traces", traces},
                    {"allocator_settings", dictionary({{"expandable_segments", plan_.device.expandable_segments}})},
                    {"external_annotations", list()}}));
    pickler.stop();
    return text;
  }

 private:
  void replay() {
    for (const BlockEvent& event : block_events(plan_.trace)) {
      if (event.time > until_) return;
      const auto& block = plan_.trace.blocks[event.block];
      const auto id = static_cast<int64_t>(event.block);
      if (event.begins && plan_.first_over == event.block) {
        trace_.push_back(dictionary({{"action", "oom"},
                                     {"size", block.bytes},
                                     {"device_free", std::max<int64_t>(plan_.budget - reserved(), 0)},
                                     {"stream", 0},
                                     {"frames", frames(block)}}));
        return;
      }
      if (event.begins) {
        allocate(id, block.bytes);
        add("alloc", address(id), block.bytes, frames(block));
      } else {
        for (const char* action : {"free_requested", "free_completed"}) add(action, address(id), block.bytes, list());
        release(id, block.bytes);
      }
    }
  }

  // Without a caching allocator every block is a segment of its own.
  bool caching() const { return plan_.device.caching_allocator; }
  int64_t address(int64_t id) const { return caching() ? allocator_.address(id) : single_.at(id); }
  int64_t reserved() const { return caching() ? allocator_.reserved() : single_bytes_; }
  void allocate(int64_t id, int64_t bytes) {
    if (caching()) {
      allocator_.allocate(id, bytes);
      return;
    }
    single_[id] = next_address_;
    add("segment_alloc", next_address_, bytes, list());
    next_address_ += CachingAllocatorModel::rounded(bytes);
    single_bytes_ += bytes;
  }
  void release(int64_t id, int64_t bytes) {
    if (caching()) return allocator_.release(id);
    add("segment_free", single_.at(id), bytes, list());
    single_.erase(id);
    single_bytes_ -= bytes;
  }

  List segments() const {
    List result = list();
    const auto add_segment = [&](int64_t address, int64_t size, bool large, const List& blocks, int64_t used) {
      result.push_back(dictionary({{"device", 0},
                                   {"address", address},
                                   {"total_size", size},
                                   {"allocated_size", used},
                                   {"active_size", used},
                                   {"requested_size", used},
                                   {"stream", 0},
                                   {"segment_type", large ? "large" : "small"},
                                   {"segment_pool_id", c10::ivalue::Tuple::create({0, 0})},
                                   {"is_expandable", plan_.device.expandable_segments},
                                   {"frames", list()},
                                   {"blocks", blocks}}));
    };
    const auto active = [&](int64_t address, int64_t size, int64_t id) {
      const auto& block = plan_.trace.blocks[static_cast<size_t>(id)];
      return dictionary({{"address", address},
                         {"size", size},
                         {"requested_size", block.bytes},
                         {"state", "active_allocated"},
                         {"frames", frames(block)}});
    };
    for (const auto& [id, address] : single_) {
      const int64_t bytes = plan_.trace.blocks[static_cast<size_t>(id)].bytes;
      List blocks = list();
      blocks.push_back(active(address, bytes, id));
      add_segment(address, bytes, bytes > CachingAllocatorModel::kSmallest, blocks, bytes);
    }
    for (const auto& segment : allocator_.segments()) {
      List blocks = list();
      int64_t used = 0;
      for (const auto& stretch : segment.stretches) {
        used += stretch.id ? stretch.size : 0;
        blocks.push_back(stretch.id ? active(stretch.address, stretch.size, *stretch.id)
                                    : dictionary({{"address", stretch.address},
                                                  {"size", stretch.size},
                                                  {"requested_size", 0},
                                                  {"state", "inactive"},
                                                  {"frames", list()}}));
      }
      add_segment(segment.address, segment.size, segment.large, blocks, used);
    }
    return result;
  }

  /// The operator, its module and the phase in the place of a stack of calls, innermost first.
  List frames(const MemoryTrace::Block& block) const {
    List result = list();
    const auto add_frame = [&](const std::string& name, const std::string& file) {
      result.push_back(dictionary({{"name", name}, {"filename", file}, {"line", 0}}));
    };
    add_frame(plan_.operator_of(block),
              plan_.module_of(block).empty() ? "(outside of modules)" : plan_.module_of(block));
    add_frame(plan_.phase_of(block), "phase");
    return result;
  }

  void add(const char* action, int64_t address, int64_t bytes, const List& frames) {
    trace_.push_back(
        dictionary({{"action", action}, {"addr", address}, {"size", bytes}, {"stream", 0}, {"frames", frames}}));
  }

  const Plan& plan_;
  int64_t until_;
  List trace_ = list();
  CachingAllocatorModel allocator_;
  std::map<int64_t, int64_t> single_;  // addresses
  int64_t next_address_ = CachingAllocatorModel::kSegmentRound, single_bytes_ = 0;
};

}  // namespace detail

/// The plan as a snapshot file of PyTorch's CUDA allocator, as torch.cuda.memory._dump_snapshot writes it: the memory
/// viewer (pytorch.org/memory_viz, torch/cuda/_memory_viz.py) opens it, for a card that need not be here. It holds
/// every allocation and release of tensors and of the device's segments, with operator, module and phase in the place
/// of a stack, and the segments as they are at the end: of the step, at its peak with `until = plan.peak_time`, or
/// where memory runs out.
HEADROOM_KERNEL std::string plan_snapshot(const Plan& plan, int64_t until = MemoryTrace::kForever);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL std::string plan_snapshot(const Plan& plan, int64_t until) {
  return detail::SnapshotWriter(plan, until).write();
}
#endif

}  // namespace headroom::inline v0
