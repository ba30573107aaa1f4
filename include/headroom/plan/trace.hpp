#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace headroom::inline v0 {

/// What a block of memory is for.
enum class MemoryUse { parameter, gradient, optimizer, activation, temporary, workspace };
inline constexpr std::string_view kMemoryUseNames[] = {"parameters",  "gradients",   "optimizer state",
                                                       "activations", "temporaries", "workspace"};
inline constexpr int kMemoryUses = 6;

/// The memory of a piece of code, event by event. Times count the events.
struct MemoryTrace {
  static constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

  /// A call of an operator. A step has up to millions of them: fields are packed.
  struct Operator {
    int32_t name;          ///< in `names`
    int32_t module = -1;   ///< in `names`: path of the module it belongs to
    int32_t phase : 31;    ///< in `names`
    bool is_node : 1 = 0;  ///< a node of the graph that backward runs, not an operator
    int32_t parent = -1;   ///< in `operators`: who called it
    int64_t begin, end = kForever;
    double flops = 0;  ///< without those of the operators it calls
  };
  struct Block {
    int64_t bytes;
    int64_t begin, end = kForever;  ///< kForever: was still there when the trace ended
    int32_t op = -1;                ///< in `operators`: who asked for it
    int32_t module = -1;            ///< in `names`: path of the module whose it is
    int32_t phase;                  ///< in `names`
    int32_t end_phase = -1;         ///< in `names`: when it was freed; -1: never
    MemoryUse use = MemoryUse::temporary;
    bool on_host = false;  ///< of a CPU tensor, while the trace is that of another device
    c10::ScalarType dtype = c10::ScalarType::Byte;
    std::vector<int64_t> shape = {};  ///< of the first tensor in it; {bytes} if nobody saw one
  };

  std::vector<std::string> names;
  std::deque<Operator> operators;  ///< in the order of their calls; a deque needs no copy to grow
  std::deque<Block> blocks;        ///< in the order of their allocation
  int64_t events = 0;
  int64_t values_read = 0;                  ///< of a dry run: readings that were given a value
  std::vector<std::string> estimated = {};  ///< operators of a dry run whose memory is not known exactly

  /// The longest path of modules that both paths start with: "layers.0.norm", "layers.0.linear" -> "layers.0".
  static std::string_view common_path(std::string_view a, std::string_view b) {
    size_t length = 0;
    for (size_t i = 0;; ++i) {
      const bool a_ends = i == a.size() || a[i] == '.', b_ends = i == b.size() || b[i] == '.';
      if (a_ends && b_ends) length = i;
      if (i >= a.size() || i >= b.size() || a[i] != b[i]) break;
    }
    return a.substr(0, length);
  }
};

namespace detail {

/// Names that are stored once.
class NameTable {
 public:
  explicit NameTable(std::vector<std::string>& names) : names_(names) {}
  int32_t operator()(std::string_view name) {
    const auto known = index_.find(name);
    if (known != index_.end()) return known->second;
    names_.emplace_back(name);
    return index_.emplace(names_.back(), static_cast<int32_t>(names_.size() - 1)).first->second;
  }

 private:
  std::vector<std::string>& names_;
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view name) const { return std::hash<std::string_view>()(name); }
  };
  std::unordered_map<std::string, int32_t, Hash, std::equal_to<>> index_;
};

/// Lets blocks that go one right after the other, in the same phase, go in the order in which they came. Where many go
/// at once, those of an optimizer or of autocast's cache, LibTorch goes through a map of addresses: the order would be
/// another one in each process.
inline void order_releases(MemoryTrace& trace) {
  std::vector<MemoryTrace::Block*> released;
  for (auto& block : trace.blocks) {
    if (block.end != MemoryTrace::kForever) released.push_back(&block);
  }
  std::ranges::sort(released, {}, &MemoryTrace::Block::end);
  for (auto run = released.begin(); run != released.end();) {
    const int64_t time = (*run)->end;
    const auto next = std::adjacent_find(run, released.end(), [](const auto* a, const auto* b) {
      return b->end != a->end + 1 || b->end_phase != a->end_phase;
    });
    const auto run_end = next == released.end() ? next : next + 1;
    std::ranges::sort(run, run_end, {}, &MemoryTrace::Block::begin);
    for (auto block = run; block != run_end; ++block) (*block)->end = time + (block - run);
    run = run_end;
  }
}

/// Begin and end of a block as one event each, in the order of time: {time, block, is begin}.
struct BlockEvent {
  int64_t time;
  size_t block;
  bool begins;
};
inline std::vector<BlockEvent> block_events(const MemoryTrace& trace) {
  std::vector<BlockEvent> events;
  events.reserve(2 * trace.blocks.size());
  for (size_t i = 0; i < trace.blocks.size(); ++i) {
    events.push_back({trace.blocks[i].begin, i, true});
    if (trace.blocks[i].end != MemoryTrace::kForever) events.push_back({trace.blocks[i].end, i, false});
  }
  std::sort(events.begin(), events.end(), [](const auto& a, const auto& b) { return a.time < b.time; });
  return events;
}

}  // namespace detail

}  // namespace headroom::inline v0
