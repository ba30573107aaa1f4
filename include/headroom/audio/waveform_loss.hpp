#pragma once

#include <torch/autograd.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "headroom/audio/stft.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/repetition.hpp"

namespace headroom::inline v0::audio {

/// A number of an estimated waveform [S] and its reference, which is number `row` of all. Differentiable.
using WaveformLoss =
    std::function<torch::Tensor(const torch::Tensor& estimate, const torch::Tensor& reference, int64_t row)>;

namespace detail {

/// Throws headroom.audio.loss.shape unless estimates and references can be compared.
inline void check_waveforms(const torch::Tensor& estimate, const torch::Tensor& reference) {
  require(estimate.defined() && reference.defined() && estimate.sizes() == reference.sizes() && estimate.dim() >= 1 &&
              estimate.numel() > 0 && estimate.is_floating_point() && reference.is_floating_point(),
          "headroom.audio.loss.shape", "got an estimate ", describe(estimate), " and a reference ", describe(reference),
          "; expected two real floating-point tensors of the same shape, samples last");
}

/// The type that estimates and references are compared in.
inline torch::ScalarType compute_type(const torch::Tensor& estimates, const torch::Tensor& references) {
  return at::promote_types(compute_type(estimates), compute_type(references));
}

/// Calls f(row) for each of `count` rows. A dry run sees the first, the second in the place of all up to the last, and
/// that.
template <class F>
void for_each_row(int64_t count, bool dry, F&& f) {
  const int64_t last = count - 1;
  for (int64_t row = 0; row <= last; ++row) {
    const bool stands_for_all = dry && row == 1 && row < last;
    const Repetition repetition(stands_for_all ? static_cast<double>(last - 1) : 1);
    f(row);
    if (stands_for_all) row = last - 1;
  }
}

/// Sum over parts and waveforms, with its gradient found during the forward pass.
///
/// A loss is a scalar: its gradient is known as soon as its value, up to one factor. So each part of each waveform is
/// differentiated and dropped before the next is made, and backward has only to scale: one tensor of the waveforms'
/// size is kept where autograd would keep every intermediate result of every part.
struct SumOverWaveforms : torch::autograd::Function<SumOverWaveforms> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& estimates,
                               const torch::Tensor& references, const std::vector<WaveformLoss>& parts) {
    const auto type = compute_type(estimates, references);
    const auto rows_of = [](const torch::Tensor& x) { return x.detach().reshape({-1, x.size(-1)}); };  // [R,S]
    const torch::Tensor estimate_rows = rows_of(estimates), reference_rows = rows_of(references);
    std::vector<torch::Tensor> gradients(2);
    if (estimates.requires_grad()) gradients[0] = torch::zeros_like(estimate_rows, type);
    if (references.requires_grad()) gradients[1] = torch::zeros_like(reference_rows, type);
    torch::Tensor total = torch::zeros({}, estimates.options().dtype(torch::kDouble).requires_grad(false));
    const torch::AutoGradMode record(gradients[0].defined() || gradients[1].defined());
    for_each_row(estimate_rows.size(0), is_dry(estimate_rows), [&](int64_t row) {
      std::vector<torch::Tensor> waveforms{estimate_rows[row].to(type).detach(), reference_rows[row].to(type).detach()};
      std::vector<torch::Tensor> leaves, sums;
      for (size_t i = 0; i < 2; ++i) {
        if (!gradients[i].defined()) continue;
        leaves.push_back(waveforms[i].requires_grad_());
        sums.push_back(gradients[i].detach()[row]);
      }
      for (const WaveformLoss& part : parts) {
        const torch::Tensor value = part(waveforms[0], waveforms[1], row);
        total += value.detach();
        if (leaves.empty()) continue;
        const auto changes = torch::autograd::grad({value}, leaves);
        for (size_t i = 0; i < leaves.size(); ++i) sums[i].add_(changes[i]);
      }
    });
    context->saved_data["sizes"] = estimates.sizes().vec();
    context->save_for_backward(gradients);
    return total.to(type);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grad_total) {
    require(
        !torch::GradMode::is_enabled(), "headroom.audio.loss.second_derivative",
        "a loss of waveforms was differentiated with create_graph=true, but it keeps its gradient and not the graph "
        "behind it; call backward without create_graph");
    const auto sizes = context->saved_data["sizes"].toIntVector();
    torch::autograd::variable_list gradients = context->get_saved_variables();
    for (torch::Tensor& gradient : gradients) {
      if (gradient.defined()) gradient = (gradient * grad_total[0]).reshape(sizes);
    }
    return {gradients[0], gradients[1], torch::Tensor()};
  }
};

/// The same of estimates and references [..., S], in float, or in double when either is double.
inline torch::Tensor sum_over_waveforms(const torch::Tensor& estimates, const torch::Tensor& references,
                                        const std::vector<WaveformLoss>& parts) {
  return SumOverWaveforms::apply(estimates, references, parts);
}

}  // namespace detail

}  // namespace headroom::inline v0::audio
