#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "headroom/core/centered_frames.hpp"
#include "headroom/core/mel.hpp"
#include "headroom/core/real_transform.hpp"
#include "headroom/core/same_shape.hpp"
#include "headroom/core/stft.hpp"

// Scores between 0 and 100 that compare magnitudes of spectra, as Music-Source-Separation-Training defines them
// (utils/metrics.py: L1Freq_metric and bleed_full). Each takes a stem block by block and keeps one frame.

namespace headroom::inline v0::core {

namespace detail {

/// References and estimates [channels, n] in one matrix [2 x channels, n]. Throws headroom.core.spectral_scores.shape.
template <class Reference, class Estimate>
Eigen::MatrixXd stacked(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
  check_same_shape("headroom.core.spectral_scores.shape", reference, estimate);
  Eigen::MatrixXd both(2 * reference.rows(), reference.cols());
  both << reference.template cast<double>(), estimate.template cast<double>();
  return both;
}

}  // namespace detail

/// 100 / (1 + 10 d), d the mean distance of magnitudes of spectra: frames of 2048 samples without window, a hop of
/// 1024.
class L1FrequencyScore {
 public:
  static constexpr Eigen::Index kLeastSamples = 1025;  ///< of a track, whose ends are mirrored

  explicit L1FrequencyScore(Eigen::Index channels)
      : frames_(2 * channels, kLength, kLength / 2, FramePadding::mirrored), transform_(kLength) {}

  /// Adds a block, [channels, samples]. Throws headroom.core.spectral_scores.shape.
  template <class Reference, class Estimate>
  void add(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
    frames_.add(detail::stacked(reference, estimate), [this](const Eigen::MatrixXd& frame) { take(frame); });
  }
  /// The score of all that was added, kLeastSamples or more. Throws headroom.core.frames.length.
  double finish() {
    frames_.finish([this](const Eigen::MatrixXd& frame) { take(frame); });
    return 100 / (1 + 10 * distance_ / count_);
  }

 private:
  static constexpr Eigen::Index kLength = 2048;

  void take(const Eigen::MatrixXd& frame) {
    const Eigen::MatrixXd magnitudes = transform_.forward(frame).cwiseAbs();
    const Eigen::Index channels = magnitudes.cols() / 2;
    distance_ += (magnitudes.leftCols(channels) - magnitudes.rightCols(channels)).cwiseAbs().sum();
    count_ += static_cast<double>(magnitudes.rows() * channels);
  }

  CenteredFrames frames_;
  detail::RealTransform transform_;
  double distance_ = 0, count_ = 0;
};

namespace detail {

/// Levels in dB of 512 mel bands in frames of 4096 samples, Hann window, a hop of 1024, zeros at both ends.
class MelLevels {
 public:
  MelLevels(Eigen::Index rows, double sample_rate)
      : frames_(rows, kLength, kLength / 4, FramePadding::zeros),
        transform_(kLength),
        window_(Stft<double>({.n_fft = kLength}).window()),
        bands_(mel_bands(sample_rate, kLength, 512)) {}

  /// `on_levels` gets [bands, rows] for each frame.
  template <class F>
  void add(const Eigen::MatrixXd& block, F&& on_levels) {
    frames_.add(block, [&](const Eigen::MatrixXd& frame) { on_levels(levels(frame)); });
  }
  template <class F>
  void finish(F&& on_levels) {
    frames_.finish([&](const Eigen::MatrixXd& frame) { on_levels(levels(frame)); });
  }

 private:
  static constexpr Eigen::Index kLength = 4096;

  Eigen::MatrixXd levels(const Eigen::MatrixXd& frame) {
    const Eigen::MatrixXd windowed = frame.array().colwise() * window_.array();
    const Eigen::MatrixXd magnitudes = transform_.forward(windowed).cwiseAbs();
    Eigen::MatrixXd levels(static_cast<Eigen::Index>(bands_.size()), frame.cols());
    for (Eigen::Index row = 0; row < levels.cols(); ++row) {
      for (Eigen::Index band = 0; band < levels.rows(); ++band) {
        const MelBand& filter = bands_[static_cast<std::size_t>(band)];
        const double magnitude = filter.weights.dot(magnitudes.col(row).segment(filter.first, filter.weights.size()));
        levels(band, row) = 20 * std::log10(std::max(magnitude, 1e-10));
      }
    }
    return levels;
  }

  CenteredFrames frames_;
  RealTransform transform_;
  Eigen::VectorXd window_;
  std::vector<MelBand> bands_;
};

}  // namespace detail

/// The first reading of a stem for BleedFullness: the highest levels, from which it looks down 80 dB.
class MelPeaks {
 public:
  MelPeaks(Eigen::Index channels, double sample_rate) : levels_(2 * channels, sample_rate) {}

  /// Adds a block, [channels, samples]. Throws headroom.core.spectral_scores.shape.
  template <class Reference, class Estimate>
  void add(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
    levels_.add(detail::stacked(reference, estimate), [this](const Eigen::MatrixXd& levels) { take(levels); });
  }
  void finish() {
    levels_.finish([this](const Eigen::MatrixXd& levels) { take(levels); });
  }
  double reference() const { return reference_; }  ///< dB
  double estimate() const { return estimate_; }    ///< dB

 private:
  void take(const Eigen::MatrixXd& levels) {
    reference_ = std::max(reference_, levels.leftCols(levels.cols() / 2).maxCoeff());
    estimate_ = std::max(estimate_, levels.rightCols(levels.cols() / 2).maxCoeff());
  }

  detail::MelLevels levels_;
  double reference_ = -200, estimate_ = -200;  // the least level there is
};

/// How little of other sources an estimate has, 100 / (1 + mean of what it is louder in dB), and how much of its own,
/// 100 / (1 + mean of what it is quieter), each over those mel bands and frames where it is.
struct BleedFullness {
  double bleedless = 100, fullness = 100;
};

/// The second reading of a stem, in the same blocks or others.
class BleedFullnessScore {
 public:
  /// `peaks` of the first reading, finished.
  BleedFullnessScore(const MelPeaks& peaks, Eigen::Index channels, double sample_rate)
      : levels_(2 * channels, sample_rate),
        reference_floor_(peaks.reference() - kRange),
        estimate_floor_(peaks.estimate() - kRange) {}

  /// Adds a block, [channels, samples]. Throws headroom.core.spectral_scores.shape.
  template <class Reference, class Estimate>
  void add(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
    levels_.add(detail::stacked(reference, estimate), [this](const Eigen::MatrixXd& levels) { take(levels); });
  }
  BleedFullness finish() {
    levels_.finish([this](const Eigen::MatrixXd& levels) { take(levels); });
    return {100 / (1 + louder_.mean()), 100 / (1 + quieter_.mean())};
  }

 private:
  static constexpr double kRange = 80;  // dB

  struct Mean {
    double sum = 0, count = 0;
    double mean() const { return count > 0 ? sum / count : 0; }
  };

  void take(const Eigen::MatrixXd& levels) {
    const Eigen::Index channels = levels.cols() / 2;
    for (Eigen::Index channel = 0; channel < channels; ++channel) {
      for (Eigen::Index band = 0; band < levels.rows(); ++band) {
        const double reference = std::max(levels(band, channel), reference_floor_);
        const double difference = std::max(levels(band, channels + channel), estimate_floor_) - reference;
        Mean& mean = difference > 0 ? louder_ : quieter_;
        mean.sum += std::abs(difference);
        mean.count += difference != 0;
      }
    }
  }

  detail::MelLevels levels_;
  double reference_floor_, estimate_floor_;
  Mean louder_, quieter_;
};

}  // namespace headroom::inline v0::core
