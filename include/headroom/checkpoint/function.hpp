#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Type.h>
#include <torch/csrc/autograd/function.h>

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/result_cache.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/phase.hpp"

namespace headroom::inline v0 {

namespace detail {

/// The place of a saved tensor: empty after forward, filled by recomputation, emptied by the backward that uses it.
struct Slot {
  explicit Slot(const at::Tensor& x)
      : sizes(x.sizes()), dtype(x.scalar_type()), device(x.device()), made_by(operator_of(x)) {}

  void fill(const at::Tensor& x) {
    require(x.sizes().equals(sizes) && x.scalar_type() == dtype && x.device() == device, "headroom.checkpoint.mismatch",
            "recomputation saved ", described(operator_of(x)), " ", x.sizes(), " ", x.scalar_type(), " on ", x.device(),
            ", expected ", described(made_by), " ", at::IntArrayRef(sizes), " ", dtype, " on ", device,
            " as in forward; forward must not depend on anything that changes in between");
    value = SavedTensor(x);
  }

  /// The node of the graph that made `x`; nullptr for an input, and for a result of the operator that saves it.
  static const std::type_info* operator_of(const at::Tensor& x) {
    const auto& node = x.grad_fn();
    if (node == nullptr) return nullptr;
    const torch::autograd::Node& made = *node;
    return &typeid(made);
  }
  static std::string described(const std::type_info* made_by) {
    if (made_by == nullptr) return "a tensor";
    // torch::autograd::generated::MulBackward0
    std::string name = c10::demangle(made_by->name());
    if (const std::size_t end = name.find('<'); end != std::string::npos && name.ends_with('>')) {
      name = name.substr(end + 1, name.size() - end - 2);  // CppNode<Function>
    }
    return "the result of " + name.substr(name.rfind(':') + 1);
  }

  at::DimVector sizes;
  c10::ScalarType dtype;
  c10::Device device;
  const std::type_info* made_by;
  SavedTensor value;
};

/// One checkpointed call. The graph is built as usual, but of the tensors that autograd saves only their order is
/// remembered. The first one that backward asks for runs forward again, which saves the same tensors in the same order.
class Recomputation : public std::enable_shared_from_this<Recomputation> {
 public:
  explicit Recomputation(std::optional<ResultCache> cache = {}) : cache_(std::move(cache)) {}
  virtual ~Recomputation() = default;

  /// Packs what autograd saves in forward.
  Unpack pack(const at::Tensor& x) {
    if (x.is_leaf() && x.requires_grad()) {  // a parameter: it lives anyway
      slots_.emplace_back();
      parameters_.emplace_back(x);
      return keep(x);
    }
    auto slot = std::make_shared<Slot>(x);
    slots_.push_back(slot);
    return [self = shared_from_this(), slot = std::move(slot)] { return self->take(*slot); };
  }

  /// Where this call's operators store their results in forward; nullptr: nowhere.
  ResultCache* cache() { return cache_ ? &*cache_ : nullptr; }

  /// Ends forward.
  void close() { state_.random.forget_unused(); }

 protected:
  /// Runs forward on the stored inputs.
  virtual void run() = 0;

 private:
  struct Done : std::exception {};

  at::Tensor take(Slot& slot) {
    // Backward may run the nodes of a graph on several threads
    const std::scoped_lock lock(mutex_);
    if (!slot.value.holds_tensor()) {
      recompute();
    }
    require(slot.value.holds_tensor(), "headroom.checkpoint.mismatch",
            "recomputation saved fewer tensors than forward, which saved ", slots_.size(),
            "; forward must not depend on anything that changes in between");
    return std::exchange(slot.value, {}).tensor();
  }

  void recompute() {
    for (const SavedTensor& parameter : parameters_) {
      parameter.check_unmodified();
    }
    std::size_t last = slots_.size();
    while (last > 0 && slots_[last - 1].expired()) {
      --last;
    }
    const AmbientStateGuard state(state_);
    const Phase phase("recomputation");
    const ResultCacheScope results(cache(), ResultCacheScope::Mode::take);
    std::size_t remaining = last;
    const SavedTensorHooks hooks(
        [&](const at::Tensor& x) -> Unpack {
          if (const auto slot = slots_[last - remaining].lock()) {
            slot->fill(x);
          }
          if (--remaining == 0) {
            throw Done{};  // what follows the last tensor that is still wanted need not be computed
          }
          return keep(x);  // for a forward that differentiates inside
        },
        &remaining);
    try {
      run();
      hooks.check();
    } catch (...) {
      if (remaining == 0) return;  // Done, or of no concern any more
      for (const auto& slot : slots_) {
        if (const auto filled = slot.lock()) {
          filled->value = {};
        }
      }
      throw;
    }
  }

  AmbientState state_;
  std::optional<ResultCache> cache_;
  std::vector<std::weak_ptr<Slot>> slots_;  // in the order of saving; a slot lives as long as the graph wants it
  std::vector<SavedTensor> parameters_;
  std::recursive_mutex mutex_;
};

/// An argument of forward, stored for its recomputation. Tensors are saved as an operation would save them, so that a
/// checkpoint inside another one does not hold its inputs either; anything else is copied.
template <class T>
class StoredInput {
 public:
  explicit StoredInput(const T& value) : value_(value) {}
  T& restore() { return value_; }

 private:
  T value_;
};

template <>
class StoredInput<at::Tensor> {
 public:
  explicit StoredInput(const at::Tensor& x)
      : defined_(x.defined()), requires_grad_(defined_ && x.requires_grad()), unpack_(defined_ ? save(x) : Unpack()) {}

  at::Tensor restore() const { return defined_ ? unpack_().detach().set_requires_grad(requires_grad_) : at::Tensor(); }

 private:
  bool defined_;
  bool requires_grad_;
  Unpack unpack_;
};

/// A random generator: the recomputation draws from a copy of what it was before the call, and leaves it alone.
template <>
class StoredInput<at::Generator> {
 public:
  explicit StoredInput(const at::Generator& generator) : before_(copy(generator)) {}
  at::Generator restore() const { return copy(before_); }

 private:
  static at::Generator copy(at::Generator generator) {
    if (!generator.defined()) return generator;
    const std::scoped_lock lock(generator.mutex());
    return generator.clone();
  }
  at::Generator before_;
};

template <class F, class... Inputs>
class RecomputedCall final : public Recomputation {
 public:
  RecomputedCall(std::optional<ResultCache> cache, F forward, const Inputs&... inputs)
      : Recomputation(std::move(cache)), forward_(std::move(forward)), inputs_(inputs...) {}

  template <class... Arguments>
  auto operator()(Arguments&&... arguments) {
    return std::invoke(forward_, std::forward<Arguments>(arguments)...);
  }

 private:
  void run() override {
    std::apply([this](auto&... inputs) { static_cast<void>((*this)(inputs.restore()...)); }, inputs_);
  }

  F forward_;
  std::tuple<StoredInput<Inputs>...> inputs_;
};

/// A call of forward that is recomputed in backward, where gradients are enabled.
template <class F, class... Inputs>
auto recomputed_call(std::optional<ResultCache> cache, F&& forward, Inputs&&... inputs) {
  if (!at::GradMode::is_enabled()) {
    return std::invoke(std::forward<F>(forward), std::forward<Inputs>(inputs)...);
  }
  using Call = RecomputedCall<std::decay_t<F>, std::decay_t<Inputs>...>;
  const auto call = std::make_shared<Call>(std::move(cache), std::forward<F>(forward), inputs...);
  const SavedTensorHooks hooks([&](const at::Tensor& x) { return call->pack(x); });
  const ResultCacheScope results(call->cache(), ResultCacheScope::Mode::store);
  auto output = (*call)(std::forward<Inputs>(inputs)...);
  call->close();
  return output;
}

}  // namespace detail

/// Calls `forward(inputs...)` and returns what it returns, but stores only the inputs for backward, which calls
/// `forward` a second time to get the rest back. The gradients are those of the plain call, bit for bit: the random
/// state and autocast are replayed.
///
/// `forward` may take and return anything; tensors inside other types (vectors, optionals) are held as they are. It is
/// copied, as is what it captures by value; what it captures by reference must live until backward. It must do the same
/// thing twice (headroom.checkpoint.mismatch) and neither it nor anybody else may change its inputs or parameters in
/// place before backward (headroom.checkpoint.modified). A random generator of your own is replayed when it is an
/// input. Checkpoints nest. Without gradients it is a plain call.
///
/// Memory: the inputs until backward, then everything that `forward` saves, until its backward is through.
/// Time: one more forward, without what follows its last saved tensor.
/// Source: Chen et al. 2016, arXiv:1604.06174; saved-tensor hooks as in torch.utils.checkpoint(use_reentrant=False).
template <class F, class... Inputs>
auto checkpoint(F&& forward, Inputs&&... inputs) {
  return detail::recomputed_call(std::nullopt, std::forward<F>(forward), std::forward<Inputs>(inputs)...);
}

/// checkpoint() that holds the results of the operators named in `keep` as well and does not run these again:
/// "headroom::attention" (its output and log-sum-exp, while its time grows with the square of the length), or any of
/// LibTorch's, such as "aten::mm". Results that are changed in place, views and random numbers are computed again. The
/// gradients are those of the plain call, bit for bit.
///
/// Memory: that of checkpoint() and the kept results. Time: one more forward without them.
/// Source: Korthikanti et al. 2022, arXiv:2205.05198 (selective activation recomputation).
template <class F, class... Inputs>
auto selective_checkpoint(KeptOperators keep, F&& forward, Inputs&&... inputs) {
  return detail::recomputed_call(std::optional<detail::ResultCache>(std::in_place, std::move(keep)),
                                 std::forward<F>(forward), std::forward<Inputs>(inputs)...);
}

}  // namespace headroom::inline v0
