#pragma once

#include <torch/arg.h>
#include <torch/autograd.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "headroom/audio/stft.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/repetition.hpp"

namespace headroom::inline v0::audio {

/// Options of MultiResolutionStftLoss; the defaults are BS-RoFormer's.
struct MultiResolutionStftLossOptions {
  /// One resolution per window length, in samples; any number of them, in any order.
  TORCH_ARG(std::vector<int64_t>, windows) = {4096, 2048, 1024, 512, 256};
  /// Samples from one frame to the next, the same at every resolution.
  TORCH_ARG(int64_t, hop) = 147;
  /// A window shorter than this is padded with zeros: n_fft = max(window, min_n_fft).
  TORCH_ARG(int64_t, min_n_fft) = 2048;
};

namespace detail {

/// estimate - reference, at least in float.
inline torch::Tensor difference(const torch::Tensor& estimate, const torch::Tensor& reference) {
  require(estimate.defined() && reference.defined() && estimate.sizes() == reference.sizes() && estimate.dim() >= 1 &&
              estimate.numel() > 0 && estimate.is_floating_point() && reference.is_floating_point(),
          "headroom.audio.loss.shape", "got an estimate ", describe(estimate), " and a reference ", describe(reference),
          "; expected two real floating-point tensors of the same shape, samples last");
  return estimate.to(compute_type(estimate)) - reference.to(compute_type(reference));
}

/// Sum over the transforms of mean |transform(difference)|, with its gradient found during the forward pass.
///
/// A loss is a scalar: its gradient is known as soon as its value, up to one factor. So each waveform's spectrum at
/// each resolution is differentiated and dropped before the next is made, and backward has only to scale: one tensor of
/// the waveforms' size is kept where autograd would keep every spectrum of every resolution.
struct SpectralMagnitude : torch::autograd::Function<SpectralMagnitude> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& difference,
                               std::vector<Stft> transforms) {
    const bool wants_gradient = difference.requires_grad();
    const torch::Tensor rows = difference.detach().reshape({-1, difference.size(-1)});  // [R,S]
    const torch::Tensor gradient = wants_gradient ? torch::zeros_like(rows) : torch::Tensor();
    torch::Tensor total = torch::zeros({}, rows.options().dtype(torch::kDouble));  // of many floats
    torch::AutoGradMode record(wants_gradient);
    const int64_t last = rows.size(0) - 1;
    for (int64_t row = 0; row <= last; ++row) {
      // A dry run sees the first, the second in the place of all up to the last, and that
      const bool stands_for_all = is_dry(rows) && row == 1 && row < last;
      const Repetition repetition(stands_for_all ? static_cast<double>(last - 1) : 1);
      const torch::Tensor waveform = rows[row].detach().requires_grad_(wants_gradient);  // [S]
      for (Stft& transform : transforms) {
        const torch::Tensor mean = transform->forward(waveform).abs().mean() / rows.size(0);
        total += mean.detach();
        if (wants_gradient) {
          gradient[row].add_(torch::autograd::grad({mean}, {waveform})[0]);
        }
      }
      if (stands_for_all) row = last - 1;
    }
    if (wants_gradient) {
      context->save_for_backward({gradient.reshape(difference.sizes())});
    }
    return total.to(rows.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grad_total) {
    require(
        !torch::GradMode::is_enabled(), "headroom.audio.loss.second_derivative",
        "the multi-resolution STFT loss was differentiated with create_graph=true, but it keeps its gradient and not "
        "the graph behind it; call backward without create_graph");
    return {context->get_saved_variables()[0] * grad_total[0], torch::Tensor()};
  }
};

}  // namespace detail

/// Distance of estimates and references in the time-frequency plane at several resolutions: the sum over the windows of
///
///   mean |STFT(estimate) - STFT(reference)|,
///
/// where |z| is the modulus of a complex number (not |re| + |im|) and the mean goes over all waveforms, bins and
/// frames. This is what BS-RoFormer trains with: F.l1_loss on the complex spectra, added up over the resolutions
/// (github.com/lucidrains/BS-RoFormer, bs_roformer.py, `multi_stft_resolution_loss`), with a Hann window.
///
/// The transform is linear, so only the difference of the waveforms is transformed. Memory: while it runs, the spectrum
/// of one waveform at one resolution and its gradient; for backward, one tensor of the estimates' size.
/// Differentiable once: a second derivative throws headroom.audio.loss.second_derivative.
class MultiResolutionStftLossImpl : public torch::nn::Cloneable<MultiResolutionStftLossImpl> {
 public:
  /// Throws headroom.audio.loss.options and headroom.core.stft.options.
  explicit MultiResolutionStftLossImpl(const MultiResolutionStftLossOptions& options_ = {}) : options(options_) {
    reset();
  }

  void reset() override {
    require(!options.windows().empty(), "headroom.audio.loss.options",
            "got no windows; expected at least one window length in samples, such as 2048");
    transforms_.clear();
    for (const int64_t window : options.windows()) {
      const int64_t n_fft = std::max(window, options.min_n_fft());
      transforms_.push_back(register_module("stft_" + std::to_string(transforms_.size()),
                                            Stft(StftOptions().n_fft(n_fft).hop(options.hop()).window(window))));
    }
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::audio::MultiResolutionStftLoss(windows=" << torch::IntArrayRef(options.windows())
           << ", hop=" << options.hop() << ", min_n_fft=" << options.min_n_fft() << ")";
  }

  /// Scalar loss of two waveforms [..., S], in float, or in double when either is double.
  /// Throws headroom.audio.loss.shape, and headroom.core.stft.length for segments of n_fft / 2 samples or less.
  torch::Tensor forward(const torch::Tensor& estimate, const torch::Tensor& reference) {
    return detail::SpectralMagnitude::apply(detail::difference(estimate, reference), transforms_);
  }

  MultiResolutionStftLossOptions options;

 private:
  std::vector<Stft> transforms_;
};

TORCH_MODULE(MultiResolutionStftLoss);

/// Options of SeparationLoss; the defaults are BS-RoFormer's.
struct SeparationLossOptions {
  /// Factor of the multi-resolution STFT loss; 0 leaves it out.
  TORCH_ARG(double, stft_weight) = 1.0;
  /// The resolutions of the STFT loss.
  TORCH_ARG(MultiResolutionStftLossOptions, stft) = {};
};

/// Loss of a separator: mean |estimate - reference| over the samples, plus `stft_weight` times MultiResolutionStftLoss.
class SeparationLossImpl : public torch::nn::Cloneable<SeparationLossImpl> {
 public:
  /// Throws headroom.audio.loss.options and headroom.core.stft.options.
  explicit SeparationLossImpl(const SeparationLossOptions& options_ = {}) : options(options_) { reset(); }

  void reset() override {
    require(options.stft_weight() >= 0, "headroom.audio.loss.options", "got stft_weight ", options.stft_weight(),
            "; expected 0 (waveforms only) or a positive factor");
    stft = register_module("stft", MultiResolutionStftLoss(options.stft()));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::audio::SeparationLoss(stft_weight=" << options.stft_weight() << ")";
  }

  /// Scalar loss of stems [B, N, C, S] (batch, stems, channels, samples), in float, or in double when either is double.
  /// Throws headroom.audio.loss.shape, and headroom.core.stft.length for segments of n_fft / 2 samples or less.
  torch::Tensor forward(const torch::Tensor& estimates, const torch::Tensor& references) {
    const torch::Tensor difference = detail::difference(estimates, references);  // [B,N,C,S]
    require(difference.dim() == 4, "headroom.audio.loss.shape", "got ", detail::describe(estimates),
            "; expected stems [B, N, C, S]: batch, stems, channels, samples");
    const torch::Tensor loss = difference.abs().mean();
    return options.stft_weight() == 0 ? loss : loss + options.stft_weight() * stft(estimates, references);
  }

  SeparationLossOptions options;
  MultiResolutionStftLoss stft = nullptr;
};

TORCH_MODULE(SeparationLoss);

}  // namespace headroom::inline v0::audio
