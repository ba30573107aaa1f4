#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <utility>

#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// While it lives, this thread's calls of LibTorch's operators go through call(), below autograd; what these call in
/// turn does not. Interceptions nest, the innermost comes first.
///
/// Operators pass through the dispatch key Fake, which has its place below autograd, where a scope includes it.
class OperatorInterception {
 public:
  /// An operator on its way to its kernel.
  struct Call {
    const c10::OperatorHandle& op;
    torch::jit::Stack& stack;  ///< ends with the arguments; with the results after proceed()
    c10::DispatchKeySet keys;
    OperatorInterception* next;  ///< the interception around this one

    void proceed() const {
      if (next != nullptr) return next->call({op, stack, keys, next->outer_});
      op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Fake), &stack);
    }
  };

  OperatorInterception() : outer_(std::exchange(current_, this)) { install(); }
  virtual ~OperatorInterception() {
    OperatorInterception** place = &current_;  // not always the innermost: one may begin within another's scope
    while (*place != this) place = &(*place)->outer_;
    *place = outer_;
  }
  OperatorInterception(const OperatorInterception&) = delete;
  OperatorInterception& operator=(const OperatorInterception&) = delete;

  /// Makes ready, once in a process: before other threads compute is best.
  static void install() {
    static const auto* const library = [] {
      auto* made = new torch::Library(torch::Library::IMPL, "_", c10::DispatchKey::Fake, __FILE__, __LINE__);
      made->fallback(torch::CppFunction::makeFromBoxedFunction<&intercept>());
      return made;
    }();
    static_cast<void>(library);
  }

 protected:
  virtual void call(const Call& call) = 0;

 private:
  static void intercept(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard once{c10::DispatchKeySet(c10::DispatchKey::Fake)};
    Call{op, *stack, keys, current_}.proceed();
  }

  static inline thread_local OperatorInterception* current_ = nullptr;

  OperatorInterception* outer_;
  c10::impl::IncludeDispatchKeyGuard included_{c10::DispatchKeySet(c10::DispatchKey::Fake)};
};

}  // namespace headroom::inline v0::detail
