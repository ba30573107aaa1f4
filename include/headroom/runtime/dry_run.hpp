#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// While it lives, this thread computes shapes only. Tensors that are made without naming a device, modules built with
/// them, and everything computed from them live on the meta device: they have sizes and no data. They stand for tensors
/// of `device`, which need not exist: code that chooses by device asks compute_device().
///
/// Tensors from before are not touched, but an operator on them gives a tensor without data, too.
class DryRun {
 public:
  explicit DryRun(c10::Device device) : outer_(std::exchange(current_, device)) {
    const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    // BackendSelect would choose a backend by the device that options name
    const c10::DispatchKeySet select(c10::DispatchKey::BackendSelect), meta(c10::DispatchKey::Meta);
    guard_.emplace((keys.included_ - select) | meta, keys.excluded_ | select);
  }
  ~DryRun() { current_ = outer_; }
  DryRun(const DryRun&) = delete;
  DryRun& operator=(const DryRun&) = delete;

  /// The device that this thread's dry run stands for; none outside of one.
  static std::optional<c10::Device> device() { return current_; }

  /// Says that code which is run dry draws random numbers here. It need not, and generators stay as they are then.
  static void note_draw() { ++draws_; }
  /// How often this thread has said so.
  static int64_t draws() { return draws_; }

 private:
  static inline thread_local int64_t draws_ = 0;
  static inline thread_local std::optional<c10::Device> current_;

  std::optional<c10::Device> outer_;
  std::optional<c10::impl::ForceDispatchKeyGuard> guard_;
};

/// While it lives, tensors that are made without naming a device are real CPU tensors, also within a dry run: for
/// integers that the CPU reads, such as lengths. No tensor of the dry run may be computed with meanwhile.
class HostTensors {
 public:
  HostTensors() {
    const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    const c10::DispatchKeySet select(c10::DispatchKey::BackendSelect);
    guard_.emplace(keys.included_.remove_backend(c10::BackendComponent::MetaBit) | select, keys.excluded_ - select);
  }
  HostTensors(const HostTensors&) = delete;
  HostTensors& operator=(const HostTensors&) = delete;

 private:
  std::optional<c10::impl::ForceDispatchKeyGuard> guard_;
};

/// Whether `x` has a size and no data: it belongs to a dry run.
inline bool is_dry(const at::Tensor& x) { return x.is_meta() && DryRun::device().has_value(); }

/// The device that computes with `x`: its own, in a dry run the one that the run stands for.
inline c10::Device compute_device(const at::Tensor& x) { return is_dry(x) ? *DryRun::device() : x.device(); }

}  // namespace headroom::inline v0
