#pragma once

#include <ATen/DeviceAccelerator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/torch.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>

#include "headroom/memory.hpp"
#include "report.hpp"

namespace headroom::benchmarks {

/// The device that a benchmark of a GPU runs on: its allocator, its clock.
class Accelerator {
 public:
  /// Throws headroom.benchmarks.device where there is none.
  explicit Accelerator(const std::string& name) : device(name) {
    const bool built = device.is_cuda() && at::getAccelerator(false) == device.type();
    require(built && at::accelerator::deviceCount() > 0, "headroom.benchmarks.device", "skipped: there is no ", name,
            " here; this benchmark needs a GPU and a LibTorch that was built for it");
    torch::empty({1}, torch::TensorOptions(device));  // makes the context
    index = at::accelerator::getDeviceIndex();
    allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
  }

  void synchronize() const { at::accelerator::synchronizeDevice(index); }
  int64_t total_bytes() const { return static_cast<int64_t>(allocator->getMemoryInfo(index).second); }
  /// What the driver calls used, by all processes: nvidia-smi's figure.
  int64_t used_bytes() const {
    const auto [free, total] = allocator->getMemoryInfo(index);
    return static_cast<int64_t>(total - free);
  }

  /// Bytes on top of what was there.
  struct Peak {
    int64_t allocated, reserved, used;
  };
  /// Runs `step` with an empty cache.
  template <class Step>
  Peak peak_of(Step&& step) const {
    synchronize();
    allocator->emptyCache();
    allocator->resetPeakStats(index);
    const auto before = allocator->getDeviceStats(index);
    const int64_t used_before = used_bytes();
    step();
    synchronize();
    const auto after = allocator->getDeviceStats(index);
    return {after.allocated_bytes[0].peak - before.allocated_bytes[0].current,
            after.reserved_bytes[0].peak - before.reserved_bytes[0].current, used_bytes() - used_before};
  }

  template <class Step>
  double seconds_of(Step&& step) const {
    synchronize();
    const auto start = std::chrono::steady_clock::now();
    step();
    synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  template <class Step>
  double shortest_of(int repeats, Step&& step) const {
    double shortest = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repeats; ++i) shortest = std::min(shortest, seconds_of(step));
    return shortest;
  }

  /// Card, driver and versions, for a report.
  nlohmann::ordered_json describe() const {
    std::string card;
    const std::unique_ptr<FILE, int (*)(FILE*)> pipe(
        popen("nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null", "r"),
        pclose);
    std::array<char, 256> line{};
    while (pipe && std::fgets(line.data(), line.size(), pipe.get()) != nullptr) card += line.data();
    while (!card.empty() && card.back() == '\n') card.pop_back();
    return {{"card", card}, {"total_bytes", total_bytes()}, {"libtorch", TORCH_VERSION}, {"cpu", processor()}};
  }

  torch::Device device;
  c10::DeviceIndex index = 0;
  c10::DeviceAllocator* allocator = nullptr;
};

}  // namespace headroom::benchmarks
