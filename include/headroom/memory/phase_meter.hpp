#pragma once

#include <c10/core/Device.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "headroom/memory/meter.hpp"

namespace headroom::inline v0 {

/// What a phase of a step took, such as "forward".
struct PhaseUse {
  std::string name;
  double seconds = 0;           ///< wall clock; on an accelerator that of enqueueing what it does, waits included
  std::int64_t peak_bytes = 0;  ///< highest sum of all tensors while it ran
};

/// The same phase again: seconds add up, the highest peak counts.
inline void add_phase(std::vector<PhaseUse>& phases, PhaseUse use) {
  const auto known = std::ranges::find(phases, use.name, &PhaseUse::name);
  if (known == phases.end()) {
    phases.push_back(std::move(use));
  } else {
    known->seconds += use.seconds;
    known->peak_bytes = std::max(known->peak_bytes, use.peak_bytes);
  }
}

/// Measures phases that follow each other, in the order in which they first come:
///
///     { const PhaseMeter::Scope scope(phases, "forward"); … }
class PhaseMeter {
 public:
  explicit PhaseMeter(c10::Device device) : device_(device) {}

  /// One phase, from here to the end of the scope.
  class Scope {
   public:
    Scope(PhaseMeter& phases, const char* name) : phases_(phases.measured_), use_{name}, meter_(phases.device_) {
      phases_.reserve(phases_.size() + 1);  // so that the end, which may be one for want of memory, takes none
    }
    ~Scope() {
      use_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
      use_.peak_bytes = meter_.peak();
      add_phase(phases_, std::move(use_));
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    std::vector<PhaseUse>& phases_;
    PhaseUse use_;
    MemoryMeter meter_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  };

  /// Since construction or the last call.
  std::vector<PhaseUse> take() { return std::exchange(measured_, {}); }

 private:
  c10::Device device_;
  std::vector<PhaseUse> measured_;
};

}  // namespace headroom::inline v0
