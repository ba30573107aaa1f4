#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/record_function.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0::detail {

/// While it lives, autocast casts the tensors of this thread's dry run as it would cast those of the device that the
/// run stands for.
///
/// LibTorch's autocast kernels leave tensors of another device type alone, and those of a dry run are on the meta
/// device. So each operator that autocast knows has one more kernel, under a dispatch key that nobody includes but this
/// scope. It hands the tensors to LibTorch's kernel in disguise: on the right device and without memory. What that
/// kernel calls, the casts and then the operator, comes through a second key, where the disguises are taken off. So
/// what is cast, the cache of cast weights and its life time, and the errors are LibTorch's own.
class MetaAutocast {
 public:
  MetaAutocast() : outer_(std::exchange(current_, this)) {
    register_kernels();
    const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    included_.emplace(keys.included_.add(kDisguise), keys.excluded_.remove(kDisguise));
  }
  ~MetaAutocast() { current_ = outer_; }
  MetaAutocast(const MetaAutocast&) = delete;
  MetaAutocast& operator=(const MetaAutocast&) = delete;

 private:
  using Keys = c10::DispatchKeySet;

  // Keys of what no longer exists, and above autograd as all of autocast
  static constexpr c10::DispatchKey kDisguise = c10::DispatchKey::AutocastIPU;
  static constexpr c10::DispatchKey kUndisguise = c10::DispatchKey::DeferredInit;

  /// Stands for a tensor of a dry run while an autocast kernel looks at it.
  struct Disguise final : c10::TensorImpl {
    explicit Disguise(const at::Tensor& x)
        : TensorImpl(Keys(kUndisguise), x.dtype(), compute_device(x)), original(x.unsafeGetTensorImpl()) {}
    c10::TensorImpl* original;  // which outlives the call
  };
  using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  using WeakPointer = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Weight {
    WeakPointer original;  // so that its address stays taken
    at::Tensor disguise;
  };

  at::Tensor disguised(const at::Tensor& x) {
    if (!x.defined()) return x;
    const bool is_weight = x.requires_grad() && x.is_leaf() && !x.is_view();
    if (!is_weight) return at::detail::make_tensor<Disguise>(x);
    // LibTorch caches the cast of a weight, which it knows by its address
    const auto known = weights_.find(x.unsafeGetTensorImpl());
    if (known != weights_.end() && known->second.disguise.scalar_type() == x.scalar_type()) {
      return known->second.disguise;
    }
    at::Tensor disguise = at::detail::make_tensor<Disguise>(x);
    disguise.requires_grad_();
    weights_.insert_or_assign(x.unsafeGetTensorImpl(), Weight{WeakPointer(x.getIntrusivePtr()), disguise});
    return disguise;
  }
  static at::Tensor undisguised(const at::Tensor& x) {
    const auto* disguise = dynamic_cast<const Disguise*>(x.unsafeGetTensorImpl());
    return disguise == nullptr ? x : at::Tensor(Pointer::unsafe_reclaim_from_nonowning(disguise->original));
  }
  template <class F>
  static void replace_tensors(at::ArrayRef<c10::IValue> values, F&& f) {
    for (const c10::IValue& value : values) {
      auto& target = const_cast<c10::IValue&>(value);
      if (value.isTensor()) {
        target = f(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& x : value.toTensorVector()) list.push_back(f(x));
        target = std::move(list);
      }
    }
  }

  /// What held where an operator was called.
  struct Caller {
    c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    bool recorded = at::isRecordFunctionEnabled();
    const Caller* outer = std::exchange(caller_, this);
    ~Caller() { caller_ = outer; }
  };

  /// The key of autocast for the device that the dry run stands for; Undefined: it is off, or there is none.
  static c10::DispatchKey enabled_key() {
    const auto device = DryRun::device();
    const bool on = current_ != nullptr && device.has_value() && at::autocast::is_autocast_available(device->type()) &&
                    at::autocast::is_autocast_enabled(device->type());
    return on ? at::autocast::get_autocast_dispatch_key_from_device_type(device->type()) : c10::DispatchKey::Undefined;
  }

  /// In the place of an autocast kernel.
  static void cast_in_disguise(const c10::OperatorHandle& op, Keys keys, torch::jit::Stack* stack) {
    const c10::DispatchKey key = enabled_key();
    if (key == c10::DispatchKey::Undefined || !op.hasKernelForDispatchKey(key)) {
      return op.redispatchBoxed(keys & Keys(Keys::FULL_AFTER, kDisguise), stack);
    }
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    const std::vector<c10::IValue> originals = arguments.vec();  // disguises do not own them
    replace_tensors(arguments, [](const at::Tensor& x) { return current_->disguised(x); });
    Caller caller;
    caller.keys.excluded_ = caller.keys.excluded_.add(key);
    const c10::impl::ForceDispatchKeyGuard only(Keys(kUndisguise), Keys(Keys::FULL).remove(kUndisguise));
    const at::RecordFunctionGuard unrecorded(false);
    op.callBoxedForDispatchKey(key, *stack);
  }
  /// For what an autocast kernel calls.
  static void call_undisguised(const c10::OperatorHandle& op, Keys, torch::jit::Stack* stack) {
    const c10::impl::ForceDispatchKeyGuard keys(caller_->keys);
    const at::RecordFunctionGuard recorded(caller_->recorded);
    replace_tensors(torch::jit::last(*stack, op.schema().arguments().size()), &undisguised);
    op.callBoxed(*stack);
  }

  /// Once and for good: no other code includes the keys.
  static void register_kernels() {
    static const auto* const registered = [] {
      auto& dispatcher = c10::Dispatcher::singleton();
      auto* kernels = new std::vector<c10::RegistrationHandleRAII>;
      kernels->push_back(dispatcher.registerFallback(kDisguise, c10::KernelFunction::makeFallthrough(), __FILE__));
      kernels->push_back(dispatcher.registerFallback(
          kUndisguise, c10::KernelFunction::makeFromBoxedFunction<&call_undisguised>(), __FILE__));
      std::unordered_set<c10::OperatorName> names;
      for (const c10::DeviceType device : at::autocast::_AUTOCAST_SUPPORTED_DEVICES) {
        const auto of_device =
            dispatcher.getRegistrationsForDispatchKey(at::autocast::get_autocast_dispatch_key_from_device_type(device));
        names.insert(of_device.begin(), of_device.end());
      }
      for (const c10::OperatorName& name : names) {
        kernels->push_back(dispatcher.registerImpl(name, kDisguise,
                                                   c10::KernelFunction::makeFromBoxedFunction<&cast_in_disguise>(),
                                                   std::nullopt, nullptr, __FILE__));
      }
      return kernels;
    }();
    static_cast<void>(registered);
  }

  static inline thread_local MetaAutocast* current_ = nullptr;
  static inline thread_local const Caller* caller_ = nullptr;

  MetaAutocast* outer_;
  std::unordered_map<const c10::TensorImpl*, Weight> weights_;
  std::optional<c10::impl::ForceDispatchKeyGuard> included_;
};

}  // namespace headroom::inline v0::detail
