#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "headroom/audio/waveform_loss.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::audio::detail {

/// The q-quantiles of rows [R,n], interpolated as numpy.quantile does: [R,1].
inline torch::Tensor row_quantiles(const torch::Tensor& rows, double q) {
  const int64_t last = rows.size(1) - 1;
  const double position = q * static_cast<double>(last);
  const auto below = static_cast<int64_t>(position);
  const torch::Tensor highest = std::get<0>(at::topk(rows, last - below + 1, 1));  // [R,k], falling
  const torch::Tensor low = highest.slice(1, last - below);
  const torch::Tensor high =
      highest.slice(1, std::max<int64_t>(last - below - 1, 0), std::max<int64_t>(last - below, 1));
  return low.lerp(high, position - static_cast<double>(below));
}

/// For each waveform of stems [B,N,C,S] the squared error from which on nothing of it counts, [R]: of every stem only
/// what is below the q-quantile of its batch does. Memory: some numbers for each sample of one stem.
inline torch::Tensor error_limits(const torch::Tensor& estimates, const torch::Tensor& references, double q) {
  const torch::NoGradGuard guard;
  const auto type = compute_type(estimates, references);
  std::vector<torch::Tensor> limits;
  for (int64_t stem = 0; stem < estimates.size(1); ++stem) {
    const torch::Tensor errors = (estimates.select(1, stem).to(type) - references.select(1, stem).to(type)).square_();
    limits.push_back(row_quantiles(errors.reshape({1, -1}), q).squeeze());
  }
  return at::stack(limits).view({1, -1, 1}).expand(estimates.sizes().slice(0, 3)).reshape({-1});
}

/// The same by whole examples: 1 for each waveform of an example whose mean squared error of that stem is below the
/// q-quantile of the batch, else 0.
inline torch::Tensor counted_waveforms(const torch::Tensor& estimates, const torch::Tensor& references, double q) {
  const torch::NoGradGuard guard;
  const auto type = compute_type(estimates, references);
  const torch::Tensor x = estimates.reshape({-1, estimates.size(3)}), y = references.reshape({-1, estimates.size(3)});
  torch::Tensor means = torch::empty({x.size(0)}, x.options().dtype(type).requires_grad(false));
  for_each_row(x.size(0), is_dry(x),
               [&](int64_t row) { means[row].copy_((x[row].to(type) - y[row].to(type)).square_().mean()); });
  const torch::Tensor of_examples = means.view(estimates.sizes().slice(0, 3)).mean(2).t();      // [N,B]
  const torch::Tensor counts = (of_examples < row_quantiles(of_examples, q)).t().unsqueeze(2);  // [B,N,1]
  return counts.expand(estimates.sizes().slice(0, 3)).reshape({-1}).to(type);                   // [R]
}

}  // namespace headroom::inline v0::audio::detail
