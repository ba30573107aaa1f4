#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/hearing_energy.hpp"
#include "headroom/audio/smallest_errors.hpp"
#include "headroom/audio/stft.hpp"
#include "headroom/audio/waveform_loss.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/log_wmse.hpp"
#include "headroom/runtime/dry_run.hpp"

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

/// Distance of estimates and references in the time-frequency plane at several resolutions: the sum over the windows of
///
///   mean |STFT(estimate) - STFT(reference)|,
///
/// where |z| is the modulus of a complex number (not |re| + |im|) and the mean goes over all waveforms, bins and
/// frames. This is what BS-RoFormer trains with: F.l1_loss on the complex spectra, added up over the resolutions
/// (github.com/lucidrains/BS-RoFormer, bs_roformer.py, `multi_stft_resolution_loss`), with a Hann window.
///
/// The transform is linear, so only the difference of the waveforms is transformed. Memory, see SumOverWaveforms: while
/// it runs, the spectrum of one waveform at one resolution and its gradient; for backward, one tensor of the estimates'
/// size. Differentiable once: a second derivative throws headroom.audio.loss.second_derivative.
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
    detail::check_waveforms(estimate, reference);
    const double waveforms = static_cast<double>(estimate.numel() / estimate.size(-1));
    return detail::sum_over_waveforms(estimate, reference, parts(1 / waveforms));
  }

  /// What it is a sum of, each times `factor`.
  std::vector<WaveformLoss> parts(double factor) {
    std::vector<WaveformLoss> all;
    for (const Stft& transform : transforms_) {
      all.push_back([=](const torch::Tensor& estimate, const torch::Tensor& reference, int64_t) {
        return Stft(transform)->forward(estimate - reference).abs().mean() * factor;
      });
    }
    return all;
  }

  MultiResolutionStftLossOptions options;

 private:
  std::vector<Stft> transforms_;
};

TORCH_MODULE(MultiResolutionStftLoss);

/// Options of SeparationLoss: the factors of its terms, 0 leaves one out, and what these need. The defaults are
/// BS-RoFormer's.
struct SeparationLossOptions {
  /// Of the mean |estimate - reference| over all samples.
  TORCH_ARG(double, l1_weight) = 1.0;
  /// Of the mean square.
  TORCH_ARG(double, mse_weight) = 0.0;
  /// Of the masked mean square: of every stem, squares from the `masked_quantile` of the batch on count as zero, so
  /// that what is wrong in the data does not teach.
  TORCH_ARG(double, masked_weight) = 0.0;
  TORCH_ARG(double, masked_quantile) = 0.95;
  /// Of whole examples, by their mean square, and not of single samples.
  TORCH_ARG(bool, masked_by_example) = true;
  /// Of the multi-resolution STFT loss.
  TORCH_ARG(double, stft_weight) = 1.0;
  /// Its resolutions.
  TORCH_ARG(MultiResolutionStftLossOptions, stft) = {};
  /// Of logWMSE, negated, in the mean over waveforms: 4 ln(e / m + 1e-8), e and m the energies of the error and of the
  /// mixture behind a filter that weights frequencies as ears do.
  TORCH_ARG(double, log_wmse_weight) = 0.0;
  /// Hz; of logWMSE.
  TORCH_ARG(double, sample_rate) = 44100;
  /// Of the mean distance of the magnitudes of spectra, frames of 2048 samples without window, a hop of 1024.
  TORCH_ARG(double, frequency_weight) = 0.0;
};

/// Loss of a separator: a weighted sum. Sources: for the masked mean square and the distance of magnitudes
/// github.com/ZFTurbo/Music-Source-Separation-Training (utils/losses.py, masked_loss; utils/metrics.py, L1Freq_metric),
/// for logWMSE core/log_wmse.hpp.
///
/// Memory, whatever the terms and the number of stems: for backward one tensor of the estimates' size; while it runs
/// the intermediate results of one term of one waveform, and for a mask of samples some numbers a sample of one stem.
/// Differentiable once: a second derivative throws headroom.audio.loss.second_derivative.
class SeparationLossImpl : public torch::nn::Cloneable<SeparationLossImpl> {
 public:
  /// Throws headroom.audio.loss.options and headroom.core.stft.options.
  explicit SeparationLossImpl(const SeparationLossOptions& options_ = {}) : options(options_) { reset(); }

  void reset() override {
    for (const auto& [name, weight] : weights()) {
      require(weight >= 0, "headroom.audio.loss.options", "got ", name, " ", weight,
              "; expected 0 (left out) or a positive factor");
    }
    const double q = options.masked_quantile();
    require(q > 0 && q <= 1, "headroom.audio.loss.options", "got masked_quantile ", q,
            "; expected above 0 and at most 1");
    stft = register_module("stft", MultiResolutionStftLoss(options.stft()));
    hearing_ = std::make_shared<detail::HearingEnergy>(options.sample_rate());
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::audio::SeparationLoss(";
    const char* separator = "";
    for (const auto& [name, weight] : weights()) {
      if (weight > 0) stream << std::exchange(separator, ", ") << name << "=" << weight;
    }
    stream << ")";
  }

  /// Scalar loss of stems [B, N, C, S] (batch, stems, channels, samples), in float, or in double when either is double.
  /// logWMSE needs the mixture [B, C, S]. Throws headroom.audio.loss.shape, and headroom.core.stft.length for segments
  /// of n_fft / 2 samples or less.
  torch::Tensor forward(const torch::Tensor& estimates, const torch::Tensor& references,
                        const torch::Tensor& mixture = {}) {
    detail::check_waveforms(estimates, references);
    require(estimates.dim() == 4, "headroom.audio.loss.shape", "got ", detail::describe(estimates),
            "; expected stems [B, N, C, S]: batch, stems, channels, samples");
    require(options.frequency_weight() == 0 || estimates.size(3) > kFrame / 2, "headroom.audio.loss.shape", "got ",
            detail::describe(estimates), "; the distance of magnitudes needs more than ", kFrame / 2, " samples");
    const double factor = static_cast<double>(estimates.size(-1)) / static_cast<double>(estimates.numel());
    std::vector<WaveformLoss> parts;
    if (const double w = options.l1_weight() * factor; w > 0) {
      parts.push_back([w](const auto& x, const auto& y, int64_t) { return (x - y).abs().mean() * w; });
    }
    if (const double w = options.mse_weight() * factor; w > 0) {
      parts.push_back([w](const auto& x, const auto& y, int64_t) { return (x - y).square().mean() * w; });
    }
    if (options.masked_weight() > 0) parts.push_back(masked(estimates, references, options.masked_weight() * factor));
    if (options.stft_weight() > 0) {
      for (WaveformLoss& part : stft->parts(options.stft_weight() * factor)) parts.push_back(std::move(part));
    }
    if (options.log_wmse_weight() > 0) {
      parts.push_back(log_wmse(estimates, mixture, options.log_wmse_weight() * factor));
    }
    if (const double w = options.frequency_weight() * factor; w > 0) {
      parts.push_back(
          [w](const auto& x, const auto& y, int64_t) { return (magnitudes(x) - magnitudes(y)).abs().mean() * w; });
    }
    return detail::sum_over_waveforms(estimates, references, parts);
  }

  SeparationLossOptions options;
  MultiResolutionStftLoss stft = nullptr;

 private:
  static constexpr int64_t kFrame = 2048;  ///< samples, of the distance of magnitudes

  std::vector<std::pair<const char*, double>> weights() const {
    return {{"l1_weight", options.l1_weight()},
            {"mse_weight", options.mse_weight()},
            {"masked_weight", options.masked_weight()},
            {"stft_weight", options.stft_weight()},
            {"log_wmse_weight", options.log_wmse_weight()},
            {"frequency_weight", options.frequency_weight()}};
  }

  WaveformLoss masked(const torch::Tensor& estimates, const torch::Tensor& references, double factor) const {
    if (options.masked_by_example()) {
      const torch::Tensor counts = detail::counted_waveforms(estimates, references, options.masked_quantile());  // [R]
      return [=](const torch::Tensor& x, const torch::Tensor& y, int64_t row) {
        return (x - y).square().mean() * counts[row] * factor;
      };
    }
    const torch::Tensor limits = detail::error_limits(estimates, references, options.masked_quantile());  // [R]
    return [=](const torch::Tensor& x, const torch::Tensor& y, int64_t row) {
      const torch::Tensor errors = (x - y).square();
      return (errors * (errors.detach() < limits[row])).mean() * factor;
    };
  }

  WaveformLoss log_wmse(const torch::Tensor& estimates, const torch::Tensor& mixture, double factor) const {
    const int64_t channels = estimates.size(2), samples = estimates.size(3);
    require(mixture.defined() && mixture.sizes() == torch::IntArrayRef{estimates.size(0), channels, samples},
            "headroom.audio.loss.shape", "got ", detail::describe(mixture), " for the mixture of stems ",
            detail::describe(estimates), "; logWMSE needs it, [B, C, S]");
    constexpr double kEpsilon = core::detail::kLogWmseEpsilon;
    const torch::Tensor rows = mixture.detach().reshape({-1, samples});
    torch::Tensor energies = torch::empty({rows.size(0)}, rows.options().dtype(detail::compute_type(estimates)));
    {
      const torch::NoGradGuard guard;
      detail::for_each_row(rows.size(0), is_dry(rows), [&](int64_t row) {
        energies[row].copy_((*hearing_)(rows[row].to(energies.scalar_type())));
      });
      energies = energies.clamp_min_(kEpsilon * kEpsilon).view({-1, 1, channels});
      energies = energies.expand(estimates.sizes().slice(0, 3)).reshape({-1});  // [R]
    }
    return [=, hearing = hearing_](const torch::Tensor& x, const torch::Tensor& y, int64_t row) {
      return ((*hearing)(x - y) / energies[row] + kEpsilon).log() * (4 * factor);
    };
  }

  static torch::Tensor magnitudes(const torch::Tensor& waveform) {
    const torch::Tensor none = torch::ones({kFrame}, waveform.options().requires_grad(false));
    return torch::stft(waveform, kFrame, kFrame / 2, c10::nullopt, none, /*center=*/true, /*pad_mode=*/"reflect",
                       /*normalized=*/false, /*onesided=*/true, /*return_complex=*/true)
        .abs();  // [F,T]
  }

  std::shared_ptr<detail::HearingEnergy> hearing_;
};

TORCH_MODULE(SeparationLoss);

}  // namespace headroom::inline v0::audio
