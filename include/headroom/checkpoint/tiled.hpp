#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/checkpoint/reentrant.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/repetition.hpp"

namespace headroom::inline v0 {

namespace detail {

/// Equal parts of a tensor along one of its dimensions.
struct Slices {
  int64_t axis = 0;
  int64_t count = 1;
};

/// A step that x goes through slice by slice.
struct TiledStage {
  std::function<at::Tensor(const at::Tensor&)> forward;
  std::function<Slices(const at::Tensor& x)> slices;
};

/// Stages one after the other. Each slice of the first goes through all others, in slices of theirs, before the next
/// slice of the first: nothing but slices is alive besides what comes in and goes out.
class TiledWork final : public ReentrantWork {
 public:
  explicit TiledWork(std::vector<TiledStage> stages) : stages_(std::move(stages)) {}

  variable_list run(const variable_list& inputs) const override { return {run_from(0, inputs[0])}; }
  variable_list differentiate(const variable_list& inputs, const variable_list& grads,
                              PieceGradients& pieces) const override {
    return {differentiate_from(0, inputs[0], grads[0], pieces)};
  }

 private:
  at::Tensor run_from(std::size_t stage, const at::Tensor& x) const {
    if (stage == stages_.size()) return x;
    return in_slices(stage, x, [&](auto&& slice) { return run_from(stage + 1, call(stage, slice(x))); });
  }

  /// Gradient of x, undefined where x wants none, given that of what the stages from this one on make of it.
  at::Tensor differentiate_from(std::size_t stage, const at::Tensor& x, const at::Tensor& grad,
                                PieceGradients& pieces) const {
    if (stage == stages_.size()) return grad;
    return in_slices(stage, x, [&](auto&& slice) {
      const at::Tensor part = slice(x).detach().requires_grad_(x.requires_grad());
      variable_list result{call(stage, part)};
      variable_list grad_result{differentiate_from(
          stage + 1, result[0].detach().requires_grad_(result[0].requires_grad()), slice(grad), pieces)};
      const at::Tensor grad_part = pieces.differentiate(std::move(result), {part}, std::move(grad_result))[0];
      return part.requires_grad() && !grad_part.defined() ? at::zeros_like(part) : grad_part;
    });
  }

  at::Tensor call(std::size_t stage, const at::Tensor& part) const {
    const at::Tensor result = stages_[stage].forward(part);
    require(result.defined() && result.sizes() == part.sizes() && result.scalar_type() == part.scalar_type(),
            "headroom.checkpoint.tiled.shape", "forward gave ", result.defined() ? result.sizes() : at::IntArrayRef(),
            " for a slice ", part.sizes(), " ", part.scalar_type(), "; expected the same shape and dtype");
    return result;
  }

  /// The results of f(slice) for all slices of x, in order, side by side; undefined where f gives none. slice(t) is the
  /// part of t, shaped as x, that the slice covers. In a dry run the second slice stands for those up to the last.
  template <class F>
  at::Tensor in_slices(std::size_t stage, const at::Tensor& x, F&& f) const {
    const Slices slices = stages_[stage].slices(x);
    const int64_t size = x.size(slices.axis), step = (size + slices.count - 1) / slices.count;
    if (step == size) return f([](const at::Tensor& t) { return t; });
    const int64_t last = (size - 1) / step * step;
    at::Tensor all;
    for (int64_t first = 0; first < size; first += step) {
      const bool stands_for_all = is_dry(x) && first == step && first < last;
      const Repetition repetition(stands_for_all ? static_cast<double>(last / step - 1) : 1);
      const auto slice = [&](const at::Tensor& t) {
        return t.narrow(slices.axis, first, std::min(step, size - first));
      };
      const at::Tensor result = f(slice);
      if (result.defined()) {
        if (!all.defined()) all = at::empty(x.sizes(), result.options().requires_grad(false));
        slice(all).copy_(result);
      }
      if (stands_for_all) first = last - step;
    }
    return all;
  }

  std::vector<TiledStage> stages_;
};

}  // namespace detail

/// Calls `forward(slice)` for `slices` slices of x along dimension `axis` and returns the results side by side, where
/// all that forward does is independent along that dimension: the batch, the other axis of an axial block, tokens of a
/// feed-forward network. Nothing is stored but x: it is a reentrant_checkpoint() whose backward computes and
/// differentiates one slice after the other.
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
  const detail::Slices along{axis < 0 ? axis + x.dim() : axis, slices};
  const std::vector<detail::TiledStage> stages{
      {std::forward<F>(forward), [along](const at::Tensor&) { return along; }}};
  return detail::reentrant_call(std::make_shared<const detail::TiledWork>(stages), {x}, parameters)[0];
}

}  // namespace headroom::inline v0
