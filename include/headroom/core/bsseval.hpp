#pragma once

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/real_transform.hpp"

// BSSEval version 4 as museval computes it (Stöter, Liutkus, Ito: "The 2018 Signal Separation Evaluation Campaign";
// Vincent, Gribonval, Févotte: "Performance measurement in blind audio source separation").
//
// An estimate is taken apart by least squares. P_j is what filters of some hundred taps, the same for the whole track,
// can make of the true source j alone (all its channels) to come near the estimate; P is what they make of all sources:
//
//   estimate = s + (P_j - s) + (P - P_j) + (estimate - P)
//            true   spatial    interference   artifacts
//
// SDR = s against all three errors, ISR = s against spatial, SIR = P_j against interference, SAR = P against artifacts,
// as ratios of energy in dB, for each frame of one second. The filters need the correlations of the whole track, so a
// track is read twice: BssCorrelations, then BssFilters, then BssFrames. Each keeps as much as a window has, whatever
// the length of the track; the equations of 4 stereo sources with 512 taps take 4096² doubles, 128 MiB.

namespace headroom::inline v0::core {

struct BssOptions {
  Eigen::Index sources = 4, channels = 2;
  Eigen::Index window = 44100, hop = 44100;  ///< of frames, in samples; museval's tools take one second
  Eigen::Index filter_length = 512;          ///< taps

  Eigen::Index rows() const { return sources * channels; }

  /// Throws headroom.core.bsseval.options.
  void check() const {
    require(sources >= 1 && channels >= 1 && window >= 1 && hop >= 1 && filter_length >= 1,
            "headroom.core.bsseval.options", "got ", sources, " sources, ", channels, " channels, window ", window,
            ", hop ", hop, ", ", filter_length, " taps; expected at least 1 of each");
  }
};

/// Scores of one source in one frame, in dB. What has no error at all has some thousand dB.
struct BssScores {
  double sdr = 0, isr = 0, sir = 0, sar = 0;
};

/// Scores of all sources in a frame; none where a true or an estimated source is silent, which museval calls NaN.
using BssFrame = std::optional<std::vector<BssScores>>;

namespace detail {

/// Throws headroom.core.bsseval.shape.
template <class References, class Estimates>
void check_bss_block(const References& references, const Estimates& estimates, const BssOptions& options) {
  require(references.rows() == options.rows() && estimates.rows() == options.rows() &&
              references.cols() == estimates.cols(),
          "headroom.core.bsseval.shape", "got references of ", references.rows(), " x ", references.cols(),
          " and estimates of ", estimates.rows(), " x ", estimates.cols(), "; expected ", options.rows(),
          " rows (sources x channels) and the same samples in both");
}

}  // namespace detail

/// The first reading of a track: how much true sources correlate with each other and with the estimates, at every
/// delay of the filters.
class BssCorrelations {
 public:
  /// Throws headroom.core.bsseval.options.
  explicit BssCorrelations(const BssOptions& options)
      : options_(options),
        transform_(detail::fast_length((options.check(), std::max<Eigen::Index>(8192, 4 * options.filter_length)))) {
    const Eigen::Index rows = options_.rows();
    references_ = estimates_ = Eigen::MatrixXd::Zero(transform_.length(), rows);
    among_references_ = with_estimates_ = Eigen::MatrixXcd::Zero(transform_.bins(), rows * rows);
  }

  const BssOptions& options() const { return options_; }

  /// Adds a block of any length, [sources x channels, samples], the channels of a source one after the other.
  /// Throws headroom.core.bsseval.shape.
  template <class References, class Estimates>
  void add(const Eigen::MatrixBase<References>& references, const Eigen::MatrixBase<Estimates>& estimates) {
    detail::check_bss_block(references, estimates, options_);
    for (Eigen::Index done = 0; done < references.cols();) {
      const Eigen::Index count = std::min(references.cols() - done, transform_.length() - filled_);
      references_.middleRows(filled_, count) = references.middleCols(done, count).transpose().template cast<double>();
      estimates_.middleRows(filled_, count) = estimates.middleCols(done, count).transpose().template cast<double>();
      filled_ += count;
      done += count;
      if (filled_ == transform_.length()) take_block();
    }
  }

  /// sum of rows `first` at n and `second` at n - delay, for delays from 0 to filter_length - 1. `first` is a true
  /// source, or with `of_estimate` an estimated one. To be called after all that is added.
  Eigen::VectorXd correlation(Eigen::Index first, Eigen::Index second, bool of_estimate) {
    if (filled_ > history()) take_block();
    const Eigen::Index column = first * options_.rows() + second;
    const Eigen::MatrixXcd& spectra = of_estimate ? with_estimates_ : among_references_;
    return transform_.inverse(spectra.col(column)).head(options_.filter_length);
  }

 private:
  Eigen::Index history() const { return options_.filter_length - 1; }

  /// A block stands behind the last samples of the one before, so that delays reach back; its spectrum without them
  /// against the spectrum with them counts each pair of samples once.
  void take_block() {
    references_.bottomRows(transform_.length() - filled_).setZero();
    estimates_.bottomRows(transform_.length() - filled_).setZero();
    const Eigen::MatrixXcd delayed = transform_.forward(references_);
    const Eigen::MatrixXd last = references_.middleRows(filled_ - history(), history());
    references_.topRows(history()).setZero();
    const Eigen::MatrixXcd present = transform_.forward(references_), estimated = transform_.forward(estimates_);
    const Eigen::Index rows = options_.rows();
    for (Eigen::Index first = 0; first < rows; ++first) {
      for (Eigen::Index second = 0; second < rows; ++second) {
        const auto conjugate = delayed.col(second).array().conjugate();
        among_references_.col(first * rows + second).array() += present.col(first).array() * conjugate;
        with_estimates_.col(first * rows + second).array() += estimated.col(first).array() * conjugate;
      }
    }
    references_.topRows(history()) = last;
    filled_ = history();
  }

  BssOptions options_;
  detail::RealTransform transform_;
  Eigen::MatrixXd references_, estimates_;              // [length, rows]: history, then the block
  Eigen::MatrixXcd among_references_, with_estimates_;  // [bins, rows x rows]
  Eigen::Index filled_ = options_.filter_length - 1;
};

/// The filters of a track: for each estimated channel those of all true sources, and those of its own source alone.
class BssFilters {
 public:
  /// Solves the normal equations, by far the most work: (sources · channels · taps)³ / 3 multiplications.
  explicit BssFilters(BssCorrelations& correlations) : options_(correlations.options()) {
    const Eigen::Index rows = options_.rows(), taps = options_.filter_length, channels = options_.channels;
    all_ = Eigen::MatrixXd(rows * taps, rows);
    for (Eigen::Index estimate = 0; estimate < rows; ++estimate) {
      for (Eigen::Index row = 0; row < rows; ++row) {
        all_.col(estimate).segment(row * taps, taps) = correlations.correlation(estimate, row, true);
      }
    }
    own_ = Eigen::MatrixXd(channels * taps, rows);
    for (Eigen::Index source = 0; source < options_.sources; ++source) {
      const Eigen::Index first = source * channels;
      own_.middleCols(first, channels) =
          solve(correlations, first, channels, all_.block(first * taps, first, channels * taps, channels));
    }
    all_ = solve(correlations, 0, rows, all_);
  }

  const BssOptions& options() const { return options_; }
  /// Taps from a row of the true sources to an estimated one, by least squares over all sources.
  auto of_all(Eigen::Index row, Eigen::Index estimate) const {
    return all_.col(estimate).segment(row * options_.filter_length, options_.filter_length);
  }
  /// The same over the channels of the estimate's own source.
  auto of_own(Eigen::Index channel, Eigen::Index estimate) const {
    return own_.col(estimate).segment(channel * options_.filter_length, options_.filter_length);
  }

 private:
  /// The correlation matrix of `rows` true channels from `first` on, at every pair of delays.
  Eigen::MatrixXd normal_matrix(BssCorrelations& correlations, Eigen::Index first, Eigen::Index rows) const {
    const Eigen::Index taps = options_.filter_length;
    Eigen::MatrixXd matrix(rows * taps, rows * taps);
    for (Eigen::Index i = 0; i < rows; ++i) {
      for (Eigen::Index j = 0; j < rows; ++j) {
        const Eigen::VectorXd delayed = correlations.correlation(first + i, first + j, false);
        for (Eigen::Index a = 0; a < taps; ++a) {  // tap a of row i with tap b of row j, b >= a; and mirrored
          matrix.col(j * taps + a).segment(i * taps, a + 1) = delayed.head(a + 1).reverse();
          matrix.row(j * taps + a).segment(i * taps, a + 1) = delayed.head(a + 1).reverse().transpose();
        }
      }
    }
    return matrix;
  }

  /// A little is added to the diagonal, as museval does; more where sources are filtered copies of each other, such as
  /// two equal channels, so that rounding leaves the matrix with negative pivots. What is projected stays the same.
  Eigen::MatrixXd solve(BssCorrelations& correlations, Eigen::Index first, Eigen::Index rows,
                        const Eigen::MatrixXd& right) const {
    for (double ridge = std::numeric_limits<double>::epsilon();;) {
      Eigen::MatrixXd matrix = normal_matrix(correlations, first, rows);
      const double largest = matrix.diagonal().maxCoeff();
      matrix.diagonal().array() += ridge;
      const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> triangle(matrix);
      if (triangle.info() == Eigen::Success) return triangle.solve(right);
      ridge = std::max(100 * ridge, 1e-13 * largest);
    }
  }

  BssOptions options_;
  Eigen::MatrixXd all_, own_;  // [rows x taps, rows], [channels x taps, rows]: a column for each estimated channel
};

/// The second reading of a track: the scores of its frames.
class BssFrames {
 public:
  explicit BssFrames(const BssFilters& filters)
      : options_(filters.options()),
        transform_(detail::fast_length(options_.window + options_.filter_length - 1)),
        references_(Eigen::MatrixXd::Zero(transform_.length(), options_.rows())),
        estimates_(references_) {
    const auto spectrum = [&](const auto& taps) {
      Eigen::MatrixXd padded = Eigen::MatrixXd::Zero(transform_.length(), 1);
      padded.topRows(taps.size()) = taps;
      return transform_.forward(padded);
    };
    for (Eigen::Index estimate = 0; estimate < options_.rows(); ++estimate) {
      Eigen::MatrixXcd all(transform_.bins(), options_.rows()), own(transform_.bins(), options_.channels);
      for (Eigen::Index row = 0; row < all.cols(); ++row) all.col(row) = spectrum(filters.of_all(row, estimate));
      for (Eigen::Index c = 0; c < own.cols(); ++c) own.col(c) = spectrum(filters.of_own(c, estimate));
      all_.push_back(std::move(all));
      own_.push_back(std::move(own));
    }
  }

  /// Adds a block as BssCorrelations::add does.
  template <class References, class Estimates>
  void add(const Eigen::MatrixBase<References>& references, const Eigen::MatrixBase<Estimates>& estimates) {
    detail::check_bss_block(references, estimates, options_);
    for (Eigen::Index done = 0; done < references.cols();) {
      const Eigen::Index left = references.cols() - done;
      const Eigen::Index count = to_skip_ > 0 ? std::min(left, to_skip_) : std::min(left, options_.window - filled_);
      if (to_skip_ > 0) {
        to_skip_ -= count;
      } else {
        references_.middleRows(filled_, count) = references.middleCols(done, count).transpose().template cast<double>();
        estimates_.middleRows(filled_, count) = estimates.middleCols(done, count).transpose().template cast<double>();
        filled_ += count;
        if (filled_ == options_.window) take_frame();
      }
      done += count;
    }
  }

  /// The frames of all that was added. A track that is shorter than a window is one frame; samples behind the last
  /// whole frame of another have no score.
  const std::vector<BssFrame>& finish() {
    if (frames_.empty() && filled_ > 0) take_frame();
    return frames_;
  }

 private:
  void take_frame() {
    frames_.push_back(is_silent(references_) || is_silent(estimates_) ? BssFrame() : scores());
    const Eigen::Index kept = std::max<Eigen::Index>(options_.window - options_.hop, 0);
    for (Eigen::MatrixXd* const samples : {&references_, &estimates_}) {
      const Eigen::MatrixXd last = samples->middleRows(options_.window - kept, kept);
      samples->setZero();
      samples->topRows(kept) = last;
    }
    filled_ = kept;
    to_skip_ = std::max<Eigen::Index>(options_.hop - options_.window, 0);
  }

  /// museval's rule: in some source the sum of the channels is 0 throughout.
  bool is_silent(const Eigen::MatrixXd& samples) const {
    for (Eigen::Index source = 0; source < options_.sources; ++source) {
      if ((samples.middleCols(source * options_.channels, options_.channels).rowwise().sum().array() == 0).all()) {
        return true;
      }
    }
    return false;
  }

  /// The filtered signals are as long as the transform at most, so that by Parseval's theorem the energies of spectra
  /// are those of signals, and nothing is transformed back.
  std::vector<BssScores> scores() {
    const Eigen::MatrixXcd references = transform_.forward(references_), estimates = transform_.forward(estimates_);
    std::vector<BssScores> scores(static_cast<std::size_t>(options_.sources));
    for (Eigen::Index source = 0; source < options_.sources; ++source) {
      double truth = 0, projected = 0, explained = 0, error = 0, spatial = 0, interference = 0, artifacts = 0;
      for (Eigen::Index c = 0; c < options_.channels; ++c) {
        const Eigen::Index row = source * options_.channels + c;
        const auto filtered = [&](const Eigen::MatrixXcd& filters, Eigen::Index first) {
          return Eigen::VectorXcd(filters.cwiseProduct(references.middleCols(first, filters.cols())).rowwise().sum());
        };
        const Eigen::VectorXcd own = filtered(own_[static_cast<std::size_t>(row)], source * options_.channels);
        const Eigen::VectorXcd all = filtered(all_[static_cast<std::size_t>(row)], 0);
        truth += energy(references.col(row));
        projected += energy(own);
        explained += energy(all);
        error += energy(estimates.col(row) - references.col(row));
        spatial += energy(own - references.col(row));
        interference += energy(all - own);
        artifacts += energy(estimates.col(row) - all);
      }
      scores[static_cast<std::size_t>(source)] = {decibels(truth, error), decibels(truth, spatial),
                                                  decibels(projected, interference), decibels(explained, artifacts)};
    }
    return scores;
  }

  /// Of a real signal, by half of its spectrum.
  template <class Spectrum>
  static double energy(const Eigen::MatrixBase<Spectrum>& spectrum) {
    const Eigen::VectorXd squares = spectrum.cwiseAbs2();
    return 2 * squares.sum() - squares(0) - squares(squares.size() - 1);
  }
  static double decibels(double signal, double error) {
    constexpr double kLeast = std::numeric_limits<double>::min();
    return 10 * (std::log10(std::max(signal, kLeast)) - std::log10(std::max(error, kLeast)));
  }

  BssOptions options_;
  detail::RealTransform transform_;
  std::vector<Eigen::MatrixXcd> all_, own_;  // for each estimated channel [bins, rows], [bins, channels]
  Eigen::MatrixXd references_, estimates_;   // [length, rows], zeros behind the window
  Eigen::Index filled_ = 0, to_skip_ = 0;
  std::vector<BssFrame> frames_;
};

/// The middle value of numbers, the mean of the two middle ones of an even count; none of none.
inline std::optional<double> median(std::vector<double> values) {
  if (values.empty()) return std::nullopt;
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// Medians over the frames of one source, as museval aggregates a track; none where each frame has something silent.
inline std::optional<BssScores> median_scores(const std::vector<BssFrame>& frames, Eigen::Index source) {
  const auto over = [&](double BssScores::*score) {
    std::vector<double> values;
    for (const BssFrame& frame : frames) {
      if (frame.has_value()) values.push_back((*frame)[static_cast<std::size_t>(source)].*score);
    }
    return median(std::move(values));
  };
  const auto sdr = over(&BssScores::sdr);
  if (!sdr.has_value()) return std::nullopt;
  return BssScores{*sdr, *over(&BssScores::isr), *over(&BssScores::sir), *over(&BssScores::sar)};
}

}  // namespace headroom::inline v0::core
