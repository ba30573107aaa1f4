#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/plan/meta_autocast.hpp"
#include "headroom/plan/meta_kernels.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/plan/trace.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/random_state.hpp"

namespace headroom::inline v0::detail {

/// The trace of a dry run of `step` on a device of the given type. Random generators are as before afterwards.
inline MemoryTrace dry_trace(const std::function<void()>& step, c10::Device device, std::optional<double> value,
                             int64_t& values_read) {
  const RandomState random = RandomState::capture();
  const MetaKernels kernels;
  TraceRecorder recorder;
  struct Restore {
    const RandomState& random;
    const TraceRecorder& recorder;
    std::optional<double> value = meta::value_read;
    int64_t count = std::exchange(meta::values_read, 0);
    std::set<std::string> estimated = std::exchange(meta::estimated, {});
    ~Restore() {
      meta::value_read = value;
      meta::values_read = count;
      meta::estimated = std::move(estimated);
      if (recorder.drew()) random.apply();  // else it would undo what other threads have drawn
    }
  } restore{random, recorder};
  meta::value_read = value;
  try {
    const DryRun run(device);
    const MetaAutocast autocast;
    step();
  } catch (const c10::NotImplementedError& error) {
    const std::string text = error.what_without_backtrace();
    constexpr std::string_view kNames = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
    const size_t colons = std::min(text.find("::"), text.size());
    const size_t first = text.find_last_not_of(kNames, colons - 1) + 1;
    const size_t last = text.find_first_not_of(std::string(kNames) + ".", std::min(colons + 2, text.size()));
    const std::string library = text.substr(first, colons - first);
    const std::string name = colons == text.size() ? "(unknown)" : text.substr(colons + 2, last - colons - 2);
    fail("headroom.memory.plan.operator", "the step calls ", library, "::", name,
         ", which has no kernel that computes shapes only. Register one before planning:\n  TORCH_LIBRARY_IMPL(",
         library, ", Meta, m) {\n    m.impl(\"", name,
         "\", [](/* its arguments */) { return at::empty(/* its sizes */); });\n  }\nLibTorch says: ",
         text.substr(0, text.find('\n')));
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    if (text.find("meta tensor") == std::string::npos && text.find("is not allocated yet") == std::string::npos &&
        text.find("data is not allocated") == std::string::npos) {
      throw;
    }
    fail("headroom.memory.plan.values",
         "the step reads the data of a tensor, which has none while it is planned: ", text.substr(0, text.find('\n')),
         "; keep what the CPU reads in a HostTensors scope, or take it out of the step");
  }
  values_read = meta::values_read;
  MemoryTrace trace = recorder.finish();
  trace.estimated.assign(meta::estimated.begin(), meta::estimated.end());
  return trace;
}

}  // namespace headroom::inline v0::detail
