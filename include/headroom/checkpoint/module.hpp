#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <utility>

#include "headroom/checkpoint/function.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0 {

namespace detail {

/// The arguments and result of a member function, as a function type.
template <class Member>
struct ForwardSignature;
template <class Result, class Module, class... Arguments>
struct ForwardSignature<Result (Module::*)(Arguments...)> {
  using type = Result(Arguments...);
};
template <class Result, class Module, class... Arguments>
struct ForwardSignature<Result (Module::*)(Arguments...) const> {
  using type = Result(Arguments...);
};

/// Every in-place change of a parameter raises the sum.
inline std::uint64_t parameter_versions(const torch::nn::Module& module) {
  std::uint64_t sum = 0;
  for (const at::Tensor& parameter : module.parameters()) {
    sum += version_of(parameter);
  }
  return sum;
}

}  // namespace detail

template <class Impl, class Signature = typename detail::ForwardSignature<decltype(&Impl::forward)>::type>
class CheckpointedImpl;

/// The module `Impl` whose forward is checkpointed. It is an `Impl`, not a module around one: same options, same
/// state-dict names, same signature (so it fits into Sequential), and code that looks for `Impl` finds it.
template <class Impl, class Result, class... Arguments>
class CheckpointedImpl<Impl, Result(Arguments...)> : public Impl {
 public:
  using Impl::Impl;

  /// Checkpoints an existing module, whose parameters and submodules are shared.
  explicit CheckpointedImpl(const Impl& module) : Impl(module) {}

  /// Impl's forward. Parameters must not change before backward (headroom.checkpoint.modified).
  Result forward(Arguments... arguments) { return recompute(std::forward<Arguments>(arguments)...); }

  /// forward with any arguments that Impl's takes: also fewer, where it has defaults.
  template <class... Given>
  Result recompute(Given&&... given) {
    // The pointer keeps the module alive until backward
    const auto self = std::static_pointer_cast<CheckpointedImpl>(this->shared_from_this());
    return checkpoint(
        [self, versions = detail::parameter_versions(*self)]<class... Inputs>(Inputs&&... inputs) -> Result {
          require(detail::parameter_versions(*self) == versions, "headroom.checkpoint.modified", "the parameters of ",
                  self->name(), " were modified between forward and backward; step the optimizer after backward");
          return self->Impl::forward(std::forward<Inputs>(inputs)...);
        },
        std::forward<Given>(given)...);
  }

  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override {
    return std::make_shared<CheckpointedImpl>(dynamic_cast<const Impl&>(*Impl::clone(device)));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "Checkpointed<";
    Impl::pretty_print(stream);
    stream << ">";
  }
};

/// `Checkpointed<FeedForward> block(FeedForwardOptions(384, {1536}))`: it computes its activations again in backward.
template <class Module>
requires std::derived_from<Module, torch::nn::ModuleHolder<typename Module::ContainedType>>
class Checkpointed : public torch::nn::ModuleHolder<CheckpointedImpl<typename Module::ContainedType>> {
 public:
  using Impl = CheckpointedImpl<typename Module::ContainedType>;
  using torch::nn::ModuleHolder<Impl>::ModuleHolder;

  /// forward, with Module's default arguments.
  template <class... Arguments>
  auto operator()(Arguments&&... arguments) {
    return (*this)->recompute(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace headroom::inline v0
