#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/memory/counting_allocator.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/plan/kernels/allocation_script.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// A CPU tensor that lies in memory in the order in which `x` does, with other sizes; without data unless zeros.
inline at::Tensor stand_in(const at::Tensor& x, at::IntArrayRef sizes, bool zeros) {
  std::vector<int64_t> order(sizes.size()), stored, place(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  bool repeats = false;
  for (size_t i = 0; i < order.size(); ++i) {
    const int64_t d = order[i];
    const bool repeated = x.stride(d) == 0 && x.size(d) > 1;
    repeats = repeats || repeated;
    stored.push_back(repeated ? 1 : sizes[static_cast<size_t>(d)]);
    place[static_cast<size_t>(d)] = static_cast<int64_t>(i);
  }
  const bool has_gaps = !repeats && !x.is_non_overlapping_and_dense();
  if (has_gaps) ++stored.back();
  const auto options = at::TensorOptions(x.scalar_type()).device(at::kCPU);
  at::Tensor made = zeros ? at::zeros(stored, options) : at::empty(stored, options);
  if (has_gaps) made = made.narrow(-1, 0, stored.back() - 1);
  return made.permute(place).expand(sizes);
}

/// While it lives, this thread runs real operators of the CPU within a dry run, to learn what they allocate. Nobody
/// else sees what it does: meters and recorders count nothing of it. Gradients are not recorded, GradMode is as
/// outside.
class KernelProbe : private AllocationListener {
 public:
  KernelProbe() {
    CountingAllocator::instance().open(window_);
    outer_ = CountingAllocator::set_aside(this);
  }
  ~KernelProbe() override {
    CountingAllocator::set_aside(outer_);
    CountingAllocator::instance().close(window_);
  }
  KernelProbe(const KernelProbe&) = delete;
  KernelProbe& operator=(const KernelProbe&) = delete;

  /// Whether an operator shall stop at its allocation number `index`, counted from 0, of `bytes`.
  using Stop = std::function<bool(size_t index, int64_t bytes)>;

  /// The script of `run`, which returns its results; up to and with the allocation where it was stopped. Without data
  /// being computed the inputs need none, so that memory which nobody touches costs nothing.
  template <std::invocable Run>
  AllocationScript record(Run&& run, Stop stop = {}) {
    script_ = {};
    live_.clear();
    failure_ = nullptr;
    stop_ = std::move(stop);
    recording_ = true;
    try {
      const std::vector<at::Tensor> results = std::invoke(std::forward<Run>(run));
      recording_ = false;
      if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
      for (const at::Tensor& x : results) {
        if (!x.defined()) {
          script_.results.emplace_back();
          continue;
        }
        const auto block = live_.find(x.storage().data_ptr().get_context());
        script_.results.push_back(
            {true, block == live_.end() ? std::nullopt : std::optional(block->second), x.suggest_memory_format()});
      }
    } catch (const Stopped&) {  // NOLINT(bugprone-empty-catch): of a script that needs nothing more
    }
    recording_ = false;
    return std::move(script_);
  }

 private:
  struct Stopped {};

  void allocated(const void* block, int64_t bytes) override {
    if (!recording_) return;
    const size_t index = script_.bytes.size();
    script_.bytes.push_back(bytes);
    script_.events.push_back({index, true});
    live_[block] = index;
    if (stop_ && stop_(index, bytes)) {
      recording_ = false;
      throw Stopped();
    }
  }
  void freed(const void* block) noexcept override {
    const auto live = live_.find(block);
    if (!recording_ || live == live_.end()) return;
    try {
      script_.events.push_back({live->second, false});
    } catch (...) {
      recording_ = false;
      failure_ = std::current_exception();
    }
    live_.erase(live);
  }

  MeterWindow window_;
  AllocationListener* outer_;
  // As on a thread of its own: on real tensors, without autocast
  c10::impl::ForceDispatchKeyGuard keys_{c10::default_included_set, c10::default_excluded_set};
  at::AutoDispatchBelowADInplaceOrView no_gradients_;
  at::DisableRecordFunctionGuard unseen_;
  bool recording_ = false;
  std::exception_ptr failure_;  // of freed()
  Stop stop_;
  AllocationScript script_;
  std::unordered_map<const void*, size_t> live_;
};

}  // namespace headroom::inline v0::detail
