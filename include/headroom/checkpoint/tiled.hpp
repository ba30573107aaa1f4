#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/kept_results.hpp"
#include "headroom/checkpoint/piece_gradients.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/dry_run/device.hpp"
#include "headroom/dry_run/phase.hpp"
#include "headroom/dry_run/repetition.hpp"

namespace headroom::inline v0 {

namespace detail {

/// A forward pass along slices of its input.
struct Tiling {
  std::function<at::Tensor(const at::Tensor&)> forward;
  int64_t axis = 0;
  int64_t slices = 1;

  /// Calls f(first, count) for every slice of x, in order. In a dry run the second one stands for those up to the last.
  template <class F>
  void for_each(const at::Tensor& x, F&& f) const {
    const int64_t size = x.size(axis), step = (size + slices - 1) / slices, last = (size - 1) / step * step;
    for (int64_t first = 0; first < size; first += step) {
      const bool stands_for_all = is_dry(x) && first == step && first < last;
      const Repetition repetition(stands_for_all ? static_cast<double>(last / step - 1) : 1);
      f(first, std::min(step, size - first));
      if (stands_for_all) first = last - step;
    }
  }
  at::Tensor checked(const at::Tensor& part, at::Tensor result) const {
    require(result.defined() && result.sizes() == part.sizes() && result.scalar_type() == part.scalar_type(),
            "headroom.checkpoint.tiled.shape", "forward gave ", result.defined() ? result.sizes() : at::IntArrayRef(),
            " for a slice ", part.sizes(), " ", part.scalar_type(), "; expected the same shape and dtype");
    return result;
  }
  at::Tensor run(const at::Tensor& x) const {
    const at::Tensor output = at::empty(x.sizes(), x.options().requires_grad(false));
    const std::uint32_t version = version_of(x);
    for_each(x, [&](int64_t first, int64_t count) {
      const at::Tensor part = x.narrow(axis, first, count);
      output.narrow(axis, first, count).copy_(checked(part, forward(part)));
    });
    require(version_of(x) == version, "headroom.checkpoint.modified", "forward changed its input ", x.sizes(),
            " in place, so that backward would compute with other values; let it work on a clone");
    return output;
  }
};

/// What the backward of a tiled call needs, beside its input.
struct TiledCall : torch::CustomClassHolder {
  TiledCall(Tiling t, at::TensorList p) : tiling(std::move(t)), parameters(p) {}
  Tiling tiling;
  Parameters parameters;
  AmbientState state;
};

struct TiledFunction : torch::autograd::Function<TiledFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, at::TensorList parameters,
                            const Tiling& tiling) {
    auto call = c10::make_intrusive<TiledCall>(tiling, parameters);
    const at::Tensor output = tiling.run(x);
    call->state.random.forget_unused();
    ctx->save_for_backward({x});
    ctx->saved_data["call"] = c10::IValue::make_capsule(std::move(call));
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    require(!at::GradMode::is_enabled(), "headroom.checkpoint.second_derivative",
            "a tiled checkpoint was differentiated with create_graph=true, but its gradients have no graph behind "
            "them; use checkpoint()");
    const at::Tensor x = ctx->get_saved_variables()[0];
    const auto holder = ctx->saved_data["call"].toCapsule();
    const auto& call = static_cast<const TiledCall&>(*holder);
    const Tiling& tiling = call.tiling;
    PieceGradients pieces(call.parameters.checked());
    const bool wants_x = ctx->needs_input_grad(0);
    const at::Tensor grad_x = wants_x ? at::empty(x.sizes(), x.options().requires_grad(false)) : at::Tensor();
    {
      const AmbientStateGuard state(call.state);
      const Phase phase("recomputation");
      const SavedTensorHooks plain([](const at::Tensor& t) { return keep(t); });  // whatever scope backward runs in
      const KeptResultsScope none(nullptr, KeptResultsScope::Mode::store);
      tiling.for_each(x, [&](int64_t first, int64_t count) {
        const at::Tensor part = x.narrow(tiling.axis, first, count).detach().requires_grad_(wants_x);
        at::Tensor result = tiling.checked(part, tiling.forward(part));
        const auto of_part = pieces.differentiate(result, {part}, grads[0].narrow(tiling.axis, first, count));
        if (wants_x && of_part[0].defined()) grad_x.narrow(tiling.axis, first, count).copy_(of_part[0]);
        if (wants_x && !of_part[0].defined()) grad_x.narrow(tiling.axis, first, count).zero_();
      });
    }
    torch::autograd::variable_list result{grad_x};
    result.insert(result.end(), pieces.sums().begin(), pieces.sums().end());
    result.emplace_back();  // the tiling
    return result;
  }
};

}  // namespace detail

/// Calls `forward(slice)` for `slices` slices of x along dimension `axis` and returns the results side by side, where
/// all that forward does is independent along that dimension: the batch, the other axis of an axial block, tokens of a
/// feed-forward network. Nothing is stored but x; backward computes and differentiates one slice after the other.
///
/// forward keeps shape and dtype (headroom.checkpoint.tiled.shape). Every leaf that it uses and that needs a gradient
/// is among `parameters` (headroom.checkpoint.captured); their gradients are summed up inside and arrive once, as do
/// their hooks. A sum over slices rounds otherwise than one over all tokens: gradients are equal up to rounding. Random
/// numbers and autocast are replayed. First derivatives only (headroom.checkpoint.second_derivative). Without gradients
/// it runs slice by slice too and stores nothing.
///
/// Memory: x and the output, in backward their gradients, and what forward and backward of one slice need.
/// Time: as checkpoint().
template <class F>
at::Tensor tiled_checkpoint(F&& forward, const at::Tensor& x, int64_t axis, int64_t slices,
                            const std::vector<at::Tensor>& parameters) {
  require(axis >= -x.dim() && axis < x.dim() && slices >= 1, "headroom.checkpoint.tiled.slices", "got ", slices,
          " slices along dimension ", axis, " of x ", x.sizes(), "; expected one slice or more along a dimension of x");
  const detail::Tiling tiling{std::forward<F>(forward), axis < 0 ? axis + x.dim() : axis, slices};
  if (!at::GradMode::is_enabled()) return tiling.run(x);
  const auto* const outer = SavedTensorHooks::current();
  const SavedTensorHooks hooks([&](const at::Tensor& saved) {  // x is kept as any input of a checkpoint
    return outer != nullptr ? outer->pack(saved) : detail::CheckpointStorageScope::keep(saved);
  });
  return detail::TiledFunction::apply(x, at::TensorList(parameters), tiling);
}

}  // namespace headroom::inline v0
