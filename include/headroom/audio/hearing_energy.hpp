#pragma once

#include <torch/types.h>

#include <Eigen/Core>
#include <cstdint>

#include "headroom/core/log_wmse.hpp"
#include "headroom/core/real_transform.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::audio::detail {

/// Energy of waveforms behind the filter of logWMSE (core/log_wmse.hpp) by Parseval's theorem: a sum over the bins of
/// their spectra, what rings on behind the end included. Differentiable.
class HearingEnergy {
 public:
  explicit HearingEnergy(double sample_rate) : sample_rate_(sample_rate) {}

  /// Of one waveform [S], in the mean over its samples.
  torch::Tensor operator()(const torch::Tensor& waveform) {
    const int64_t samples = waveform.size(0);
    const torch::Tensor& weights = weights_for(waveform);
    const torch::Tensor spectrum = at::fft_rfft(waveform, length_);  // [F]
    return (at::view_as_real(spectrum).square().sum(1) * weights).sum() / samples;
  }

 private:
  /// What the squared magnitude of a bin counts: the filter's gain, twice where a bin stands for two.
  const torch::Tensor& weights_for(const torch::Tensor& waveform) {
    if (weights_.defined() && samples_ == waveform.size(0) && weights_.options().type_equal(waveform.options()) &&
        weights_.device() == waveform.device()) {
      return weights_;
    }
    samples_ = waveform.size(0);
    const Eigen::VectorXd filter = core::detail::hearing_filter(sample_rate_);
    length_ = core::detail::fast_length(samples_ + filter.size());
    const int64_t bins = length_ / 2 + 1;
    const auto real = waveform.options().requires_grad(false);
    if (is_dry(waveform)) return weights_ = torch::empty({bins}, real.dtype(torch::kDouble)).to(real);
    core::detail::RealTransform transform(length_);
    Eigen::MatrixXd padded = Eigen::MatrixXd::Zero(length_, 1);
    padded.topRows(filter.size()) = filter;
    Eigen::VectorXd gains = transform.forward(padded).col(0).cwiseAbs2() / static_cast<double>(length_);
    gains.segment(1, bins - 2) *= 2;
    return weights_ = at::tensor(torch::ArrayRef<double>(gains.data(), gains.size())).to(real);  // [F]
  }

  double sample_rate_;
  int64_t samples_ = 0, length_ = 0;  ///< of the waveforms, of their transform
  torch::Tensor weights_;             ///< for these
};

}  // namespace headroom::inline v0::audio::detail
