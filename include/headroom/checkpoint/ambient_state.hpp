#pragma once

#include <ATen/core/grad_mode.h>

#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/random_state.hpp"

namespace headroom::inline v0::detail {

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
