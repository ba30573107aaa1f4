#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>

#include "headroom/core/error.hpp"
#include "headroom/core/real_transform.hpp"

// logWMSE as version 1.1.0 of the package torch-log-wmse defines it (Jordal: log-wmse-audio-quality; Landschoot:
// torch-log-wmse): the energy of an error against that of the mixture, both behind a filter that weights frequencies as
// ears do. It has a meaning for silent references, too.

namespace headroom::inline v0::core {

namespace detail {

inline constexpr double kHearingRate = 44100;  // Hz, which the filter is designed for

/// How loud the ear takes the angular frequency `omega` of a signal of 44.1 kHz, after Fenton and Lee: a shelf of 5 dB
/// above 1500 Hz, 2.5 dB around 500 Hz, and Butterworth filters below 120 Hz and above 10 kHz. Each is a bilinear
/// transform of an analog filter of which s = j tan(omega / 2) / tan(pi f / rate) is the frequency.
inline double hearing_gain(double omega) {
  const auto frequency = [&](double hertz) {
    return std::tan(omega / 2) / std::tan(std::numbers::pi * hertz / kHearingRate);
  };
  const auto squared = [](std::complex<double> s) { return s * s; };
  const std::complex<double> j(0, 1);
  const double shelf_gain = std::pow(10, 5.0 / 40), shelf_width = std::sqrt(2 * shelf_gain);
  const std::complex<double> s = j * frequency(1500);
  const double shelf = std::abs(shelf_gain * (shelf_gain * squared(s) + shelf_width * s + 1.0) /
                                (squared(s) + shelf_width * s + shelf_gain));
  const double peak_gain = std::pow(10, 2.5 / 40), peak_width = std::sqrt(2.0) / 1.5;
  const std::complex<double> p = j * frequency(500);
  const double peak =
      std::abs((squared(p) + peak_width * peak_gain * p + 1.0) / (squared(p) + peak_width / peak_gain * p + 1.0));
  const double low = std::pow(frequency(120), 2), high = std::pow(frequency(10000), 2);
  return shelf * peak * low / std::sqrt(1 + low * low) / (1 + high);
}

/// `taps` of a filter for another sample rate as torchaudio's Resample makes them: by a sinc with a Hann window over
/// six of its zeros to either side.
inline Eigen::VectorXd resampled(const Eigen::VectorXd& taps, double from, double to) {
  constexpr double kZeros = 6, kPi = std::numbers::pi;
  const double band = 0.99 * std::min(from, to);
  Eigen::VectorXd result(static_cast<Eigen::Index>(std::ceil(static_cast<double>(taps.size()) * to / from)));
  for (Eigen::Index n = 0; n < result.size(); ++n) {
    result(n) = 0;
    for (Eigen::Index k = 0; k < taps.size(); ++k) {
      const double t = (static_cast<double>(k) / from - static_cast<double>(n) / to) * band;
      if (std::abs(t) >= kZeros) continue;
      const double sinc = t == 0 ? 1 : std::sin(kPi * t) / (kPi * t);
      result(n) += taps(k) * sinc * std::pow(std::cos(kPi * t / kZeros / 2), 2) * band / from;
    }
  }
  return result;
}

/// The filter with that gain and no phase, 4000 taps around the middle one at 44.1 kHz.
inline Eigen::VectorXd hearing_filter(double sample_rate) {
  constexpr Eigen::Index kLength = 8192, kTaps = 4000;
  RealTransform transform(kLength);
  Eigen::VectorXcd gains(transform.bins());
  for (Eigen::Index k = 0; k < gains.size(); ++k) {  // the package's bins end one before half the rate
    gains(k) = hearing_gain(std::numbers::pi * static_cast<double>(k) / static_cast<double>(gains.size()));
  }
  const Eigen::VectorXd response = transform.inverse(gains);
  Eigen::VectorXd taps(kTaps);
  for (Eigen::Index i = 0; i < kTaps; ++i) taps(i) = response((i + 1 - kTaps / 2 + kLength) % kLength);
  return sample_rate == kHearingRate ? taps : resampled(taps, kHearingRate, sample_rate);
}

}  // namespace detail

/// Energy of signals behind the filter of hearing, collected block by block; what rings on behind the end counts. What
/// is kept is one block of some times the filter's length.
class HearingEnergy {
 public:
  /// Throws headroom.core.log_wmse.options.
  HearingEnergy(Eigen::Index channels, double sample_rate)
      : HearingEnergy(channels, checked_filter(channels, sample_rate)) {}

  /// Adds a block, [channels, samples]. Throws headroom.core.log_wmse.shape.
  template <class Block>
  void add(const Eigen::MatrixBase<Block>& block) {
    require(block.rows() == samples_.cols(), "headroom.core.log_wmse.shape", "got ", block.rows(),
            " channels, expected ", samples_.cols());
    for (Eigen::Index done = 0; done < block.cols();) {
      const Eigen::Index count = std::min(block.cols() - done, samples_.rows() - filled_);
      samples_.middleRows(filled_, count) = block.middleCols(done, count).transpose().template cast<double>();
      filled_ += count;
      done += count;
      if (filled_ == samples_.rows()) take_block();
    }
    total_ += block.cols();
  }

  /// Energy of each channel of all that was added, by its number of samples; 0 when nothing was.
  Eigen::ArrayXd finish() {
    const Eigen::Index samples = std::max<Eigen::Index>(total_, 1);
    add(Eigen::MatrixXd::Zero(samples_.cols(), history_));
    take_block();
    return energy_ / static_cast<double>(samples);
  }

 private:
  static Eigen::VectorXd checked_filter(Eigen::Index channels, double sample_rate) {
    require(channels >= 1 && sample_rate >= 1, "headroom.core.log_wmse.options", "got ", channels, " channels of ",
            sample_rate, " Hz; expected at least 1 of each");
    return detail::hearing_filter(sample_rate);
  }
  HearingEnergy(Eigen::Index channels, const Eigen::VectorXd& filter)
      : transform_(detail::fast_length(4 * filter.size())), history_(filter.size() - 1) {
    Eigen::MatrixXd padded = Eigen::MatrixXd::Zero(transform_.length(), 1);
    padded.topRows(filter.size()) = filter;
    filter_ = transform_.forward(padded);
    samples_ = Eigen::MatrixXd::Zero(transform_.length(), channels);
    energy_ = Eigen::ArrayXd::Zero(channels);
    filled_ = history_;
  }

  /// A block stands behind the last samples of the one before, as many as the filter reaches back.
  void take_block() {
    samples_.bottomRows(samples_.rows() - filled_).setZero();
    const Eigen::MatrixXcd spectra = transform_.forward(samples_);
    for (Eigen::Index channel = 0; channel < samples_.cols(); ++channel) {
      const Eigen::VectorXd filtered = transform_.inverse(spectra.col(channel).cwiseProduct(filter_));
      energy_(channel) += filtered.segment(history_, filled_ - history_).squaredNorm();
    }
    samples_.topRows(history_) = samples_.middleRows(filled_ - history_, history_).eval();
    filled_ = history_;
  }

  detail::RealTransform transform_;
  Eigen::VectorXcd filter_;  // [bins]
  Eigen::MatrixXd samples_;  // [length, channels]: history, then the block
  Eigen::ArrayXd energy_;    // [channels]
  Eigen::Index history_, filled_ = 0, total_ = 0;
};

namespace detail {

inline constexpr double kLogWmseEpsilon = 1e-8;

}  // namespace detail

/// logWMSE of one stem, -4 ln(e / m + eps) in the mean over channels, from the HearingEnergy e of its error, m of the
/// mixture; eps = 1e-8. Higher is better, 73.7 without any error. Throws headroom.core.log_wmse.shape.
inline double log_wmse(const Eigen::ArrayXd& error, const Eigen::ArrayXd& mixture) {
  require(error.size() == mixture.size() && error.size() > 0, "headroom.core.log_wmse.shape", "got energies of ",
          error.size(), " channels of the error and ", mixture.size(), " of the mixture, expected the same");
  constexpr double kEpsilon = detail::kLogWmseEpsilon;
  return -4 * (error / mixture.max(kEpsilon * kEpsilon) + kEpsilon).log().mean();
}

}  // namespace headroom::inline v0::core
