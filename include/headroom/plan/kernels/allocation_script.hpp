#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace headroom::inline v0::detail {

/// What an operator allocates and frees, in order.
struct AllocationScript {
  struct Event {
    size_t block;
    bool begins;
  };
  struct Result {
    bool is_there = false;             ///< the operator gave a tensor
    std::optional<size_t> block = {};  ///< none: it is empty
    at::MemoryFormat format = at::MemoryFormat::Contiguous;
  };

  std::vector<int64_t> bytes;  ///< of the blocks, in the order of their allocation
  std::vector<Event> events;
  std::vector<Result> results;
  bool is_estimate = false;  ///< of a larger problem than the one that was run

  /// Blocks that are allocated before the first one is freed.
  size_t before_release() const {
    const auto release = std::find_if(events.begin(), events.end(), [](const Event& event) { return !event.begins; });
    return static_cast<size_t>(release - events.begin());
  }

  /// Adds a block that is allocated just before block `index` and freed just after that was allocated.
  void insert_around(size_t index, int64_t size) {
    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(index), size);
    for (Event& event : events) event.block += event.block >= index ? 1 : 0;
    for (Result& result : results) {
      if (result.block.has_value() && *result.block >= index) ++*result.block;
    }
    auto inner = std::find_if(events.begin(), events.end(), [&](const Event& e) { return e.block == index + 1; });
    inner = std::next(events.insert(inner, {index, true}));
    events.insert(std::next(inner), {index, false});
  }

  /// Allocates and frees as the operator does, tensors without data. `make(i, format)` makes the i-th result.
  template <class Make>
  std::vector<at::Tensor> replay(Make&& make) const {
    std::vector<at::Tensor> blocks(bytes.size()), made(results.size());
    for (const Event& event : events) {
      at::Tensor& block = blocks[event.block];
      if (!event.begins) {
        block.reset();
        continue;
      }
      const auto result = std::find_if(results.begin(), results.end(),
                                       [&](const Result& r) { return r.block.has_value() && *r.block == event.block; });
      if (result == results.end()) {
        block = at::empty({bytes[event.block]}, at::TensorOptions(at::kByte).device(at::kMeta));
      } else {
        const auto index = static_cast<size_t>(result - results.begin());
        block = made[index] = make(index, result->format);
      }
    }
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].is_there && !results[i].block.has_value()) made[i] = make(i, results[i].format);
    }
    return made;
  }
};

/// The script of `key`, which is probed the first time; none if that gives none.
template <std::invocable Make>
std::optional<AllocationScript> probed_script(const std::string& key, Make&& probe) {
  static auto& scripts = *new std::map<std::string, std::optional<AllocationScript>>;
  static std::mutex mutex;
  {
    const std::scoped_lock lock(mutex);
    if (const auto known = scripts.find(key); known != scripts.end()) return known->second;
  }
  std::optional<AllocationScript> script = std::invoke(std::forward<Make>(probe));
  const std::scoped_lock lock(mutex);
  return scripts.emplace(key, std::move(script)).first->second;
}

namespace meta {
/// Operators of this thread's dry run whose memory is not known exactly.
inline thread_local std::set<std::string> estimated;
}  // namespace meta

}  // namespace headroom::inline v0::detail
