#pragma once

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <torch/torch.h>

#include <cstdlib>
#include <optional>
#include <string>

#include "support/catch.hpp"

namespace headroom::testing {

/// The device that the tests in this folder run on: CUDA, or what HEADROOM_TEST_DEVICE names. With "cpu" they try
/// themselves out where there is no GPU.
inline torch::Device test_device() {
  const char* const name = std::getenv("HEADROOM_TEST_DEVICE");
  return torch::Device(name == nullptr ? "cuda" : name);
}

/// Why the tests cannot run on their device, or, where `accelerator_only`, have nothing to say on the CPU.
inline std::optional<std::string> why_skipped(bool accelerator_only) {
  const torch::Device device = test_device();
  if (device.is_cpu()) {
    return accelerator_only ? std::optional<std::string>("skipped: only an accelerator has this") : std::nullopt;
  }
  if (at::getAccelerator(false) != device.type()) return "skipped: LibTorch was not built for " + device.str();
  if (at::accelerator::deviceCount() == 0) return "skipped: there is no " + device.str() + " here";
  return std::nullopt;
}

/// Leaves a test that cannot run; ctest reports it as skipped.
#define SKIP_WITHOUT_DEVICE(accelerator_only)                                         \
  if (const auto reason = headroom::testing::why_skipped(accelerator_only); reason) { \
    WARN(*reason);                                                                    \
    return;                                                                           \
  }

inline void synchronize() {
  if (!test_device().is_cpu()) at::accelerator::synchronizeDevice(at::accelerator::getDeviceIndex());
}

/// Kernels whose sums have a fixed order. An operator that has none throws, or is used as it is with `warn_only`; so is
/// then the backward pass of memory-efficient attention, which has one.
class Deterministic {
 public:
  explicit Deterministic(bool warn_only = false) : before_(at::globalContext().deterministicAlgorithms()) {
    ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
    at::globalContext().setDeterministicAlgorithms(true, warn_only);
  }
  ~Deterministic() { at::globalContext().setDeterministicAlgorithms(before_, false); }
  Deterministic(const Deterministic&) = delete;
  Deterministic& operator=(const Deterministic&) = delete;

 private:
  bool before_;
};

}  // namespace headroom::testing
