#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <vector>

namespace headroom::inline v0::detail {

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

}  // namespace headroom::inline v0::detail
