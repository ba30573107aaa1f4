#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <typeinfo>
#include <utility>

#include "headroom/checkpoint/operator_interception.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

namespace detail {

inline void require_stock_engine(const torch::autograd::Engine& present) {
  require(typeid(present) == typeid(torch::autograd::Engine), "headroom.checkpoint.engine",
          "this process runs the autograd engine ", typeid(present).name(),
          ", expected LibTorch's own; inside Python use torch.utils.checkpoint");
}

}  // namespace detail

/// Brings a saved tensor back when backward needs it; may be called more than once (retain_graph).
using Unpack = std::function<at::Tensor()>;
/// Receives a tensor that autograd is about to save and decides what to keep of it.
using Pack = std::function<Unpack(const at::Tensor&)>;

/// While it lives, every tensor that autograd saves on this thread goes through `pack`: torch.autograd.graph's
/// saved_tensors_hooks for C++. Scopes nest, the innermost one counts. `pack` runs without gradients and must not keep
/// its argument itself (an output would keep its own graph alive): keep `x.detach()` or something made of it.
///
/// What `pack` throws is thrown by the next operator that this thread calls in the scope; where none follows, by the
/// backward that asks for the tensor. Thrown at once it would be a leak: a torch::autograd::Function that saves its own
/// result lets go of it when all that it saves is packed, and otherwise holds it, and itself, for ever.
///
///     SavedTensorHooks offload([](const Tensor& x) -> Unpack {
///       return [host = x.cpu(), device = x.device()] { return host.to(device); };
///     });
///
/// LibTorch asks the autograd engine for such hooks and only Python's engine has any, so the first scope puts an engine
/// of ours in place of the default one, for good. Throws headroom.checkpoint.engine when a program, such as a Python
/// process, has brought its own.
class SavedTensorHooks {
 public:
  /// `remaining`: how many more tensors `pack` takes before it throws, if it does; it must outlive the scope.
  explicit SavedTensorHooks(Pack pack, const std::size_t* remaining = nullptr)
      : pack_(std::move(pack)), remaining_(remaining), outer_(std::exchange(current_, this)) {
    try {
      Engine::install();
    } catch (...) {
      current_ = outer_;
      throw;
    }
  }
  ~SavedTensorHooks() { current_ = outer_; }
  SavedTensorHooks(const SavedTensorHooks&) = delete;
  SavedTensorHooks& operator=(const SavedTensorHooks&) = delete;

  /// The innermost scope of this thread, or nullptr.
  static const SavedTensorHooks* current() { return current_; }

  /// Whether anything goes on after the next `count` tensors. Where not, a recomputation ends there, and an operator
  /// that saves as many need not compute its result.
  static bool go_on_after(std::size_t count) {
    return current_ == nullptr || current_->remaining_ == nullptr || *current_->remaining_ > count;
  }

  /// Hands `x` over as autograd would. Throws what `pack` throws, or has thrown.
  Unpack pack(const at::Tensor& x) const {
    check();
    const at::NoGradGuard no_grad;
    return pack_(x);
  }

  /// Throws what `pack` has thrown.
  void check() const {
    if (failure_) std::rethrow_exception(failure_->error);
  }

 private:
  class Hooks final : public torch::autograd::SavedVariableHooks {
   public:
    void call_pack_hook(const at::Tensor& x) override {
      try {
        unpack_ = current_->pack(x);
      } catch (...) {
        const auto error = std::current_exception();
        if (!current_->failure_) current_->failure_.emplace(error);
        unpack_ = [error]() -> at::Tensor { std::rethrow_exception(error); };
      }
    }
    at::Tensor call_unpack_hook() override { return unpack_(); }

   private:
    Unpack unpack_;
  };

  /// Ends what a scope's `pack` has failed in.
  struct Failure final : detail::OperatorInterception {
    explicit Failure(std::exception_ptr e) : error(std::move(e)) {}
    void call(const Call&) override { std::rethrow_exception(error); }

    std::exception_ptr error;
  };

  class Engine final : public torch::autograd::Engine {
   public:
    static void install() {
      [[maybe_unused]] static const bool once = [] {
        detail::require_stock_engine(get_default_engine());
        detail::OperatorInterception::install();
        // LibTorch gives the threads of devices to one engine a process, the first that asks: that is the stock one,
        // so that ours is not given them again after it has started its own
        get_default_engine().initialize_device_threads_pool();
        instance().start_device_threads();
        torch::autograd::set_default_engine_stub([]() -> torch::autograd::Engine& { return instance(); });
        return true;
      }();
    }
    /// Never destroyed: graphs may outlive static destruction.
    static Engine& instance() {
      static auto* engine = new Engine;
      return *engine;
    }

    std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
      return current_ != nullptr ? std::make_unique<Hooks>() : nullptr;
    }
  };

  static inline thread_local SavedTensorHooks* current_ = nullptr;

  Pack pack_;
  const std::size_t* remaining_;
  SavedTensorHooks* outer_;
  std::optional<Failure> failure_;
};

namespace detail {

/// Grows with every in-place change of `x`; inference tensors do not count.
inline std::uint32_t version_of(const at::Tensor& x) { return x.is_inference() ? 0 : x._version(); }

/// A tensor without its graph, and its version, which counts changes of the original too: LibTorch skips the version
/// check of tensors that go through hooks.
class SavedTensor {
 public:
  SavedTensor() = default;
  explicit SavedTensor(const at::Tensor& x) : tensor_(x.tensor_data()), version_(version_of(tensor_)) {}

  bool holds_tensor() const { return tensor_.defined(); }
  /// As it is now, modified or not.
  const at::Tensor& unchecked() const { return tensor_; }

  void check_unmodified() const {
    require(!holds_tensor() || version_of(tensor_) == version_, "headroom.checkpoint.modified", "a tensor of shape ",
            tensor_.sizes(), " was modified in place after forward used it, so that backward ",
            "would compute with other values; clone it first, or step the optimizer after backward");
  }

  const at::Tensor& tensor() const {
    check_unmodified();
    return tensor_;
  }

 private:
  at::Tensor tensor_;
  std::uint32_t version_ = 0;
};

/// Keeps `x` as autograd does without hooks.
inline Unpack keep(const at::Tensor& x) {
  return [kept = SavedTensor(x)] { return kept.tensor(); };
}

/// Where checkpoints of this thread keep their inputs while it lives: through `pack`. Scopes nest, the innermost
/// counts. Inputs of a checkpoint inside another one are not kept at all, here neither.
class CheckpointStorageScope {
 public:
  explicit CheckpointStorageScope(Pack pack) : pack_(std::move(pack)), outer_(std::exchange(current_, this)) {}
  ~CheckpointStorageScope() { current_ = outer_; }
  CheckpointStorageScope(const CheckpointStorageScope&) = delete;
  CheckpointStorageScope& operator=(const CheckpointStorageScope&) = delete;

  /// Keeps `x`, an input of a checkpoint.
  static Unpack keep(const at::Tensor& x) {
    if (current_ == nullptr || (x.is_leaf() && x.requires_grad())) return detail::keep(x);
    const at::NoGradGuard no_grad;
    return current_->pack_(x);
  }

 private:
  static inline thread_local const CheckpointStorageScope* current_ = nullptr;

  Pack pack_;
  const CheckpointStorageScope* outer_;
};

/// Saves an input of a checkpoint: through the enclosing hooks, where there are any, else where inputs are kept.
inline Unpack save(const at::Tensor& x) {
  const SavedTensorHooks* hooks = SavedTensorHooks::current();
  return hooks != nullptr ? hooks->pack(x) : CheckpointStorageScope::keep(x);
}

}  // namespace detail
}  // namespace headroom::inline v0
