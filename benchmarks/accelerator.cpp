#include "accelerator.hpp"

#include <ATen/DeviceAccelerator.h>
#include <torch/types.h>
#include <torch/version.h>

#include <array>
#include <cstdio>
#include <memory>

#include "headroom/core/error.hpp"
#include "timing.hpp"

namespace headroom::benchmarks {

Accelerator::Accelerator(const std::string& name) : device(name) {
  const bool built = device.is_cuda() && at::getAccelerator(false) == device.type();
  require(built && at::accelerator::deviceCount() > 0, "headroom.benchmarks.device", "skipped: there is no ", name,
          " here; this benchmark needs a GPU and a LibTorch that was built for it");
  torch::empty({1}, torch::TensorOptions(device));  // makes the context
  index = at::accelerator::getDeviceIndex();
  allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
}

void Accelerator::synchronize() const { at::accelerator::synchronizeDevice(index); }

int64_t Accelerator::used_bytes() const {
  const auto [free, total] = allocator->getMemoryInfo(index);
  return static_cast<int64_t>(total - free);
}

Accelerator::Peak Accelerator::peak_of(const std::function<void()>& step) const {
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

double Accelerator::seconds_of(const std::function<void()>& step) const {
  synchronize();
  return benchmarks::seconds_of([&] {
    step();
    synchronize();
  });
}

Row Accelerator::describe() const {
  std::string card;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(
      popen("nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null", "r"), pclose);
  std::array<char, 256> line{};
  while (pipe && std::fgets(line.data(), line.size(), pipe.get()) != nullptr) card += line.data();
  while (!card.empty() && card.back() == '\n') card.pop_back();
  return {{"card", card}, {"total_bytes", total_bytes()}, {"libtorch", TORCH_VERSION}, {"cpu", processor()}};
}

}  // namespace headroom::benchmarks
