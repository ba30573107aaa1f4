#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <functional>
#include <string>

#include "benchmark.hpp"
#include "timing.hpp"

namespace headroom::benchmarks {

/// The device that a benchmark of a GPU runs on: its allocator, its clock.
class Accelerator {
 public:
  /// Throws headroom.benchmarks.device where there is none.
  explicit Accelerator(const std::string& name);

  void synchronize() const;
  int64_t total_bytes() const { return static_cast<int64_t>(allocator->getMemoryInfo(index).second); }
  /// What the driver calls used, by all processes: nvidia-smi's figure.
  int64_t used_bytes() const;

  /// Bytes on top of what was there.
  struct Peak {
    int64_t allocated, reserved, used;
  };
  /// Runs `step` with an empty cache.
  Peak peak_of(const std::function<void()>& step) const;
  double seconds_of(const std::function<void()>& step) const;

  /// Card, driver and versions, for a report.
  Row describe() const;

  c10::Device device;
  c10::DeviceIndex index = 0;
  c10::DeviceAllocator* allocator = nullptr;
};

/// Seconds of a step on a GPU, without one on the CPU.
inline double seconds_on(const Accelerator* gpu, const std::function<void()>& step) {
  return gpu != nullptr ? gpu->seconds_of(step) : seconds_of(step);
}

}  // namespace headroom::benchmarks
