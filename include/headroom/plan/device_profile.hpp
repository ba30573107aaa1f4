#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <fstream>
#include <initializer_list>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/resident.hpp"

namespace headroom::inline v0 {

/// A device that a step is planned for. Every figure has a source beside it; "assumption" starts that of a guess.
struct DeviceProfile {
  std::string name;
  std::string type = "cuda";  ///< of the device, as torch::Device spells it
  int64_t total_bytes = 0;
  std::string total_bytes_source;
  int64_t context_bytes = 0;  ///< taken before the first tensor
  std::string context_bytes_source;
  int64_t workspace_bytes = 0;  ///< that libraries hold beside tensors
  std::string workspace_bytes_source;
  double flops_per_second = 0;  ///< float, dense
  std::string flops_per_second_source = {};
  bool caching_allocator = true;  ///< memory goes through LibTorch's caching allocator
  bool expandable_segments = false;

  /// What tensors may take.
  int64_t usable_bytes() const { return total_bytes - context_bytes - workspace_bytes; }
  c10::Device device() const { return c10::Device(type); }

  static void describe(auto& self, auto&& field) {
    constexpr double kMost = 1e18;
    field("name", self.name, {.required = true}, "what --device calls it");
    field("type", self.type, {}, "device type of LibTorch: cuda, cpu, …");
    field("total_bytes", self.total_bytes, {.required = true, .at_least = 1, .at_most = kMost}, "memory of the device");
    field("total_bytes_source", self.total_bytes_source, {.required = true}, "where the figure comes from");
    field("context_bytes", self.context_bytes, {.required = true, .at_least = 0, .at_most = kMost},
          "taken before the first tensor");
    field("context_bytes_source", self.context_bytes_source, {.required = true}, "where the figure comes from");
    field("workspace_bytes", self.workspace_bytes, {.required = true, .at_least = 0, .at_most = kMost},
          "that libraries hold beside tensors");
    field("workspace_bytes_source", self.workspace_bytes_source, {.required = true}, "where the figure comes from");
    field("flops_per_second", self.flops_per_second, {.at_least = 0}, "float, dense; 0: unknown, no time is estimated");
    field("flops_per_second_source", self.flops_per_second_source, {.may_be_empty = true},
          "where the figure comes from");
    field("caching_allocator", self.caching_allocator, {}, "memory goes through LibTorch's caching allocator");
    field("expandable_segments", self.expandable_segments, {}, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True");
  }
};

namespace detail {

struct NvidiaCard {
  const char* name;
  int64_t mebibytes;
  const char* mebibytes_source;
  double teraflops;
  int64_t workspace_bytes;
  const char* workspace_source;
};

inline DeviceProfile profile_of(const NvidiaCard& card) {
  return {.name = card.name,
          .total_bytes = card.mebibytes << 20,
          .total_bytes_source = card.mebibytes_source,
          .context_bytes = int64_t{777} << 20,
          .context_bytes_source =
              "an H200 with LibTorch 2.11 and CUDA 13: 529 MiB of context, 777 with cuBLAS, cuDNN "
              "and cuFFT loaded; an assumption for other cards",
          .workspace_bytes = card.workspace_bytes,
          .workspace_bytes_source = card.workspace_source,
          .flops_per_second = card.teraflops * 1e12,
          .flops_per_second_source = "NVIDIA data sheet, FP32 without tensor cores"};
}

}  // namespace detail

/// The cards that are known by name.
inline std::vector<DeviceProfile> known_devices() {
  constexpr int64_t kHopper = 65 << 20, kOthers = 4096 * 1024 * 2 + 16 * 1024 * 8;
  constexpr const char* kDefault =
      "LibTorch's default for cuBLAS before Hopper, aten/src/ATen/cuda/CublasHandlePool.cpp";
  constexpr const char* kMeasured = "an H200 with LibTorch 2.11: what stays allocated after training steps";
  std::vector<DeviceProfile> profiles;
  for (const detail::NvidiaCard& card : std::initializer_list<detail::NvidiaCard>{
           {"rtx-pro-6000-97gb", 97887, "the guide: 97.9 GB total (nvidia-smi: 97887 MiB)", 125, kHopper,
            "assumption: as on Hopper"},
           {"h200-141gb", 143771, "nvidia-smi: 143771 MiB", 67, kHopper, kMeasured},
           {"h100-80gb", 81559, "nvidia-smi: 81559 MiB", 67, kHopper, kMeasured},
           {"a6000-48gb", 49140, "nvidia-smi: 49140 MiB", 38.7, kOthers, kDefault},
           {"rtx-4090-24gb", 24564, "nvidia-smi: 24564 MiB", 82.6, kOthers, kDefault},
           {"rtx-4080-16gb", 16376, "nvidia-smi: 16376 MiB", 48.7, kOthers, kDefault},
           {"rtx-4060-8gb", 8188, "nvidia-smi: 8188 MiB", 15.1, kOthers, kDefault},
       }) {
    profiles.push_back(detail::profile_of(card));
  }
  return profiles;
}

/// This machine's CPU (Linux): its memory, and what the process holds now. Tensors are allocated as asked for.
inline DeviceProfile this_machine() {
  std::ifstream file("/proc/meminfo");
  std::string field;
  int64_t kibibytes = 0;
  file >> field >> kibibytes;
  require(field == "MemTotal:" && kibibytes > 0, "headroom.memory.resident",
          "/proc/meminfo does not start with MemTotal: the memory of this machine needs Linux with /proc mounted");
  return {.name = "cpu",
          .type = "cpu",
          .total_bytes = kibibytes * 1024,
          .total_bytes_source = "/proc/meminfo, MemTotal",
          .context_bytes = resident_bytes(),
          .context_bytes_source = "measured: what this process holds now",
          .workspace_bytes = int64_t{35} << 20,
          .workspace_bytes_source = "assumption: code and tables of LibTorch that the first step loads, 34 to 36 MiB",
          .caching_allocator = false};
}

/// A profile by name: "cpu" or one of known_devices(). Throws headroom.memory.device_name.
inline DeviceProfile device_profile(std::string_view name) {
  if (name == "cpu") return this_machine();
  std::string names = "cpu";
  for (DeviceProfile& profile : known_devices()) {
    if (profile.name == name) return std::move(profile);
    names += ", " + profile.name;
  }
  fail("headroom.memory.device_name", "no device is called ", name, "; expected one of ", names,
       ", or the path of a JSON profile that ends with .json");
}

}  // namespace headroom::inline v0
