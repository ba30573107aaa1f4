#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::detail {

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
    std::erase_if(states_, [](const auto& entry) { return equal(entry.second, read(entry.first)); });
  }

  /// The same generators as they are now.
  RandomState current() const {
    RandomState now;
    for (const auto& [generator, state] : states_) {
      now.states_.emplace_back(generator, read(generator));
    }
    return now;
  }

  /// Puts the captured states in place. Allocates no tensor, so that it works when memory is full. Does nothing in a
  /// dry run, which has not drawn: others may have.
  void apply() const {
    if (DryRun::device().has_value()) return;
    for (const auto& [generator, state] : states_) {
      at::Generator target = generator;
      const std::scoped_lock lock(target.mutex());
      target.set_state(state);
    }
  }

 private:
  void add(c10::Device device) {
    const at::Generator& generator = at::globalContext().defaultGenerator(device);
    states_.emplace_back(generator, read(generator));
  }

  static at::Tensor read(at::Generator generator) {
    const std::scoped_lock lock(generator.mutex());
    return generator.get_state();
  }

  static bool equal(const at::Tensor& a, const at::Tensor& b) {
    return a.nbytes() == b.nbytes() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
  }

  std::vector<std::pair<at::Generator, at::Tensor>> states_;
  int64_t draws_ = DryRun::draws();
};

/// Autocast of this thread: per device type whether and to which dtype, and the cache of cast weights.
class AutocastState {
 public:
  static AutocastState capture() {
    AutocastState now;
    for (const c10::DeviceType device : at::autocast::_AUTOCAST_SUPPORTED_DEVICES) {
      now.settings_.push_back(
          {device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)});
    }
    now.cache_ = at::autocast::is_autocast_cache_enabled();
    return now;
  }

  void apply() const {
    for (const auto& [device, enabled, dtype] : settings_) {
      at::autocast::set_autocast_enabled(device, enabled);
      at::autocast::set_autocast_dtype(device, dtype);
    }
    at::autocast::set_autocast_cache_enabled(cache_);
  }

 private:
  struct Setting {
    c10::DeviceType device;
    bool enabled;
    at::ScalarType dtype;
  };
  std::vector<Setting> settings_;
  bool cache_ = true;
};

/// An autocast region: puts autocast into a state for its lifetime, and what was there back afterwards. The outermost
/// region clears the cache of cast weights.
class AutocastGuard {
 public:
  explicit AutocastGuard(const AutocastState& state) {
    state.apply();
    at::autocast::increment_nesting();
  }
  /// As it is, but enabled on one device type.
  AutocastGuard(c10::DeviceType device, at::ScalarType dtype) : AutocastGuard(AutocastState::capture()) {
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, dtype);
  }
  ~AutocastGuard() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    before_.apply();
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  AutocastState before_ = AutocastState::capture();
};

/// What a forward pass depends on besides its arguments.
struct AmbientState {
  RandomState random = RandomState::capture();
  AutocastState autocast = AutocastState::capture();
};

/// Puts an AmbientState with gradients enabled in place for its lifetime, and what was there back afterwards.
class AmbientStateGuard {
 public:
  explicit AmbientStateGuard(const AmbientState& state) : autocast_(state.autocast), random_(state.random.current()) {
    state.random.apply();
  }
  ~AmbientStateGuard() { random_.apply(); }
  AmbientStateGuard(const AmbientStateGuard&) = delete;
  AmbientStateGuard& operator=(const AmbientStateGuard&) = delete;

 private:
  AutocastGuard autocast_;  // backward usually runs outside of any region: this is the outermost one
  RandomState random_;
  at::AutoGradMode gradients_{true};
};

}  // namespace headroom::inline v0::detail
