#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/runtime/random_state.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// Whether an exception says that memory ran out: c10::OutOfMemoryError (accelerators, MemoryMeter::set_limit),
/// std::bad_alloc, and the plain c10::Error that LibTorch's CPU allocator and CUDA's libraries throw.
inline bool is_out_of_memory(const std::exception& error) {
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) return true;
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) return true;
  const auto* const plain = dynamic_cast<const c10::Error*>(&error);
  if (plain == nullptr) return false;
  constexpr std::array<std::string_view, 3> kSigns{"DefaultCPUAllocator", "CUDA error: out of memory",
                                                   "CUBLAS_STATUS_ALLOC_FAILED"};
  const std::string text = plain->what_without_backtrace();
  for (const std::string_view sign : kSigns) {
    if (text.find(sign) != std::string::npos) return true;
  }
  return false;
}

/// Gives back what is held without need: autocast's copies of weights and the free segments of an accelerator's
/// caching allocator.
inline void release_caches(c10::Device device) {
  at::autocast::clear_cache();
  if (auto* const allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()))) {
    allocator->emptyCache();
  }
}

/// Runs `f`, and once more after release_caches() when it ran out of memory. `f` must stand being repeated: what it
/// changed before it failed must not be changed twice.
template <std::invocable F>
void run_twice_if_out_of_memory(c10::Device device, F&& f) {
  try {
    std::invoke(f);
    return;
  } catch (const std::exception& error) {
    if (!is_out_of_memory(error)) throw;
  }
  release_caches(device);
  std::invoke(f);
}

/// What a step may take.
struct MemoryBudget {
  /// That MemoryMeter::live() may reach; CPU only, none: what the device has.
  std::optional<std::int64_t> bytes = {};
  c10::Device device = c10::kCPU;
};

/// Sizes of the parts that a batch is cut into, one attempt after the other: 8 gives 8, 4, 2, 1.
inline std::vector<std::int64_t> halvings(std::int64_t batch) {
  std::vector<std::int64_t> sizes;
  for (; batch > 0; batch /= 2) sizes.push_back(batch);
  return sizes;
}

namespace detail {

/// What a forward and a backward pass change: gradients, buffers and random generators. Gradients that are not there
/// cost nothing, others a copy.
class StepStart {
 public:
  explicit StepStart(const torch::nn::Module& module) {
    const at::NoGradGuard guard;
    for (const at::Tensor& parameter : module.parameters()) {
      const at::Tensor& gradient = parameter.grad();
      gradients_.push_back({parameter, gradient, gradient.defined() ? gradient.clone() : at::Tensor()});
    }
    for (const at::Tensor& buffer : module.buffers()) buffers_.push_back({buffer, buffer.clone()});
  }

  /// Puts everything back. Allocates no tensor, so that it works when memory is full.
  void restore() const {
    const at::NoGradGuard guard;
    for (const auto& [parameter, gradient, value] : gradients_) {
      parameter.mutable_grad() = gradient;
      if (gradient.defined()) gradient.copy_(value);
    }
    for (const auto& [buffer, value] : buffers_) buffer.copy_(value);
    random_.apply();
  }

 private:
  struct Gradient {
    at::Tensor parameter, gradient, value;
  };
  struct Buffer {
    at::Tensor buffer, value;
  };
  std::vector<Gradient> gradients_;
  std::vector<Buffer> buffers_;
  RandomState random_ = RandomState::capture();
};

}  // namespace detail

/// Runs `step(attempt)` with the first of `attempts` for which memory suffices, and returns that one. What an attempt
/// did before it ran out of memory is undone: its tensors are freed, caches are emptied, and the gradients and buffers
/// of `module` and the default random generators are as they were, so that the step that goes through gives the bits of
/// one that was never preceded by another.
///
/// `step` is forward and backward passes; it must not step an optimizer. An attempt is anything that makes the step
/// smaller: the size of the parts that a batch is cut into, or a checkpoint policy. When the last one fails, too, its
/// error passes through, and everything is as before the call. Other errors pass through as they are.
///
///     optimizer.zero_grad();  // gradients that are there would be copied
///     run_within({.bytes = int64_t{8} << 30}, *model, halvings(x.size(0)), [&](int64_t size) {
///       for (const Tensor& part : x.split(size)) (model(part).square().mean() * part.size(0) / x.size(0)).backward();
///     });
///     optimizer.step();
///
/// Throws headroom.memory.run_within when there is no attempt, headroom.memory.unsupported for a limit on an
/// accelerator.
template <class Attempt, std::invocable<const Attempt&> Step>
Attempt run_within(const MemoryBudget& budget, const torch::nn::Module& module, const std::vector<Attempt>& attempts,
                   Step&& step) {
  require(!attempts.empty(), "headroom.memory.run_within",
          "there is nothing to attempt, expected one attempt or more, such as halvings(8)");
  std::optional<detail::StepStart> start;
  run_twice_if_out_of_memory(budget.device, [&] { start.emplace(module); });
  std::optional<MemoryMeter> meter;
  if (budget.bytes) {
    meter.emplace(budget.device);
    meter->set_limit(budget.bytes);
  }
  for (std::size_t i = 0;; ++i) {
    try {
      std::invoke(step, attempts[i]);
      return attempts[i];
    } catch (const std::exception& error) {
      if (!is_out_of_memory(error)) throw;
      start->restore();
      if (i + 1 == attempts.size()) throw;
    }
    release_caches(budget.device);
  }
}

}  // namespace headroom::inline v0
