#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

/// The state of a generator, which other threads may be drawing from.
inline at::Tensor generator_state(at::Generator generator) {
  const std::scoped_lock lock(generator.mutex());
  return generator.get_state();
}

/// Puts a state from generator_state() into a generator. Allocates no tensor, so that it works when memory is full.
inline void set_generator_state(at::Generator generator, const at::Tensor& state) {
  const std::scoped_lock lock(generator.mutex());
  generator.set_state(state);
}

/// The states of the default random generators: the CPU's and that of the accelerator in use.
class RandomState {
 public:
  /// The states as they are now.
  static RandomState capture() {
    RandomState now;
    now.add(c10::Device(c10::kCPU));
    // A LibTorch that was built for an accelerator also runs where there is none
    if (const auto accelerator = at::getAccelerator(false); accelerator && at::accelerator::deviceCount() > 0) {
      now.add(c10::Device(*accelerator, at::accelerator::getDeviceIndex()));
    }
    return now;
  }

  /// Forgets the generators that nothing has drawn from since capture(): there is nothing to replay, and rewinding them
  /// would disturb other threads.
  void forget_unused() {
    if (DryRun::device().has_value()) {  // what a generator has done meanwhile it has done for other threads
      if (DryRun::draws() == draws_) states_.clear();
      return;
    }
    std::erase_if(states_, [](const auto& entry) { return equal(entry.second, generator_state(entry.first)); });
  }

  /// The same generators as they are now.
  RandomState current() const {
    RandomState now;
    for (const auto& [generator, state] : states_) {
      now.states_.emplace_back(generator, generator_state(generator));
    }
    return now;
  }

  /// Puts the captured states in place. Allocates no tensor, as set_generator_state. Does nothing in a dry run, which
  /// has not drawn: others may have.
  void apply() const {
    if (DryRun::device().has_value()) return;
    for (const auto& [generator, state] : states_) set_generator_state(generator, state);
  }

 private:
  void add(c10::Device device) {
    const at::Generator& generator = at::globalContext().defaultGenerator(device);
    states_.emplace_back(generator, generator_state(generator));
  }

  static bool equal(const at::Tensor& a, const at::Tensor& b) {
    return a.nbytes() == b.nbytes() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
  }

  std::vector<std::pair<at::Generator, at::Tensor>> states_;
  int64_t draws_ = DryRun::draws();
};

}  // namespace headroom::inline v0::detail
