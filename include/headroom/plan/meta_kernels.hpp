#pragma once

#include <torch/library.h>

#include <memory>
#include <mutex>
#include <utility>

#include "headroom/plan/kernels/attention.hpp"
#include "headroom/plan/kernels/convolution.hpp"
#include "headroom/plan/kernels/elementwise.hpp"
#include "headroom/plan/kernels/fourier.hpp"
#include "headroom/plan/kernels/indexing.hpp"
#include "headroom/plan/kernels/losses.hpp"
#include "headroom/plan/kernels/lstm.hpp"
#include "headroom/plan/kernels/norms.hpp"
#include "headroom/plan/kernels/padding.hpp"
#include "headroom/plan/kernels/recurrent.hpp"
#include "headroom/plan/kernels/reductions.hpp"
#include "headroom/plan/kernels/registry.hpp"
#include "headroom/plan/kernels/values.hpp"

namespace headroom::inline v0 {

namespace detail::meta {

/// All shape kernels, registered while it lives.
class Registration {
 public:
  Registration() {
    for (const auto add_family : {&register_attention, &register_convolutions, &register_elementwise,
                                  &register_indexing, &register_losses, &register_lstm, &register_norms,
                                  &register_padding, &register_reductions, &register_transforms, &register_values}) {
      add_family(kernels_);
    }
    RecurrentLayers::register_in(autograd_);
  }

 private:
  KernelRegistry kernels_;
  torch::Library autograd_{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMeta, __FILE__, __LINE__};
};

}  // namespace detail::meta

/// While it lives, operators that LibTorch implements for the meta device in Python only, or not at all, have kernels
/// there. They compute shapes and make the tensors that the CPU's kernels make, temporary ones included. Scopes nest;
/// plan() opens one by itself.
///
/// An operator that is still missing is registered like this, before planning:
///
///     TORCH_LIBRARY_IMPL(aten, Meta, m) {
///       m.impl("bincount", [](const Tensor& x, const std::optional<Tensor>&, int64_t least) { return …; });
///     }
class MetaKernels {
 public:
  MetaKernels() {
    const std::scoped_lock lock(mutex());
    std::shared_ptr<detail::meta::Registration> shared = current().lock();
    if (shared == nullptr) current() = shared = std::make_shared<detail::meta::Registration>();
    registration_ = std::move(shared);
  }
  ~MetaKernels() {
    const std::scoped_lock lock(mutex());
    registration_.reset();
  }
  MetaKernels(const MetaKernels&) = delete;
  MetaKernels& operator=(const MetaKernels&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::weak_ptr<detail::meta::Registration>& current() {
    static std::weak_ptr<detail::meta::Registration> registration;
    return registration;
  }

  std::shared_ptr<detail::meta::Registration> registration_;
};

}  // namespace headroom::inline v0
