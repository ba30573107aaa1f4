#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/plan/meta_autocast.hpp"
#include "headroom/plan/meta_kernels.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/plan/trace.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/random_state.hpp"

namespace headroom::inline v0::detail {

/// Throws headroom.memory.plan.operator: what to register for the operator that `error` of LibTorch names.
[[noreturn]] inline void fail_without_kernel(const c10::NotImplementedError& error) {
  const std::string text = error.what_without_backtrace();
  const std::string letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
  const size_t colons = std::min(text.find("::"), text.size());
  const size_t first = text.find_last_not_of(letters, colons - 1) + 1;
  const size_t last = text.find_first_not_of(letters + ".", std::min(colons + 2, text.size()));
  const std::string library = text.substr(first, colons - first);
  const std::string name = colons == text.size() ? "(unknown)" : text.substr(colons + 2, last - colons - 2);
  fail("headroom.memory.plan.operator", "the step calls ", library, "::", name,
       ", which has no kernel that computes shapes only. Register one before planning:\n  TORCH_LIBRARY_IMPL(", library,
       ", Meta, m) {\n    m.impl(\"", name,
       "\", [](/* its arguments */) { return at::empty(/* its sizes */); });\n  }\nLibTorch says: ",
       text.substr(0, text.find('\n')));
}

/// Throws headroom.memory.plan.values where LibTorch complains of a tensor that has no data.
inline void fail_if_data_was_read(const c10::Error& error) {
  const std::string text = error.what_without_backtrace();
  for (const char* sign : {"meta tensor", "is not allocated yet", "data is not allocated"}) {
    require(
        text.find(sign) == std::string::npos, "headroom.memory.plan.values",
        "the step reads the data of a tensor, which has none while it is planned: ", text.substr(0, text.find('\n')),
        "; keep what the CPU reads in a HostTensors scope, or take it out of the step");
  }
}

/// What a dry run changes of this thread while it lives, put back at its end: what reading a value gives, what is only
/// estimated, random generators.
class DryRunState {
 public:
  DryRunState(const TraceRecorder& recorder, const RandomState& random, std::optional<double> value)
      : recorder_(recorder), random_(random) {
    meta::value_read = value;
  }
  ~DryRunState() {
    meta::value_read = value_;
    meta::values_read = values_read_;
    meta::estimated = std::move(estimated_);
    if (recorder_.drew()) random_.apply();  // else it would undo what other threads have drawn
  }
  DryRunState(const DryRunState&) = delete;
  DryRunState& operator=(const DryRunState&) = delete;

 private:
  const TraceRecorder& recorder_;
  const RandomState& random_;
  std::optional<double> value_ = meta::value_read;
  int64_t values_read_ = std::exchange(meta::values_read, 0);
  std::set<std::string> estimated_ = std::exchange(meta::estimated, {});
};

/// The trace of a dry run of `step` on a device of the given type. `value`: what reading a value gives; none: it fails.
HEADROOM_KERNEL MemoryTrace dry_trace(const std::function<void()>& step, c10::Device device,
                                      std::optional<double> value = {});

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL MemoryTrace dry_trace(const std::function<void()>& step, c10::Device device,
                                      std::optional<double> value) {
  const RandomState random = RandomState::capture();
  const MetaKernels kernels;
  TraceRecorder recorder;
  const DryRunState state(recorder, random, value);
  try {
    const DryRun run(device);
    const MetaAutocast autocast;
    step();
  } catch (const c10::NotImplementedError& error) {
    fail_without_kernel(error);
  } catch (const c10::Error& error) {
    fail_if_data_was_read(error);
    throw;
  }
  MemoryTrace trace = recorder.finish();
  trace.values_read = meta::values_read;
  trace.estimated.assign(meta::estimated.begin(), meta::estimated.end());
  return trace;
}
#endif

}  // namespace headroom::inline v0::detail
