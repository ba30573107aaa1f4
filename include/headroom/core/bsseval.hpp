#pragma once

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/bss_correlations.hpp"
#include "headroom/core/executor.hpp"
#include "headroom/core/median.hpp"
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
// the length of the track; the equations of 4 stereo sources with 512 taps take 4096² doubles, 128 MiB. An executor
// runs the transforms and products of both readings; the numbers are the same whatever its threads.

namespace headroom::inline v0::core {

/// Scores of one source in one frame, in dB. What has no error at all has some thousand dB.
struct BssScores {
  double sdr = 0, isr = 0, sir = 0, sar = 0;
};

/// Scores of all sources in a frame; none where a true or an estimated source is silent, which museval calls NaN.
using BssFrame = std::optional<std::vector<BssScores>>;

/// The filters of a track: for each estimated channel those of all true sources, and those of its own source alone.
class BssFilters {
 public:
  /// Solves the normal equations, by far the most work: (sources · channels · taps)³ / 3 multiplications.
  template <Executor E>
  explicit BssFilters(BssCorrelations<E>& correlations) : options_(correlations.options()) {
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
  template <Executor E>
  Eigen::MatrixXd normal_matrix(BssCorrelations<E>& correlations, Eigen::Index first, Eigen::Index rows) const {
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
  /// two equal channels, so that rounding leaves the matrix with negative pivots. Two steps of iterative refinement
  /// with the matrix as it was take out again what that changes where the sources have any sound.
  template <Executor E>
  Eigen::MatrixXd solve(BssCorrelations<E>& correlations, Eigen::Index first, Eigen::Index rows,
                        const Eigen::MatrixXd& right) const {
    for (double ridge = std::numeric_limits<double>::epsilon();;) {
      Eigen::MatrixXd matrix = normal_matrix(correlations, first, rows);
      const Eigen::VectorXd diagonal = matrix.diagonal();
      matrix.diagonal().array() += ridge;
      // The triangle takes the place of the matrix up to the diagonal; above it the matrix stays
      const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> triangle(matrix);
      if (triangle.info() == Eigen::Success) {
        Eigen::MatrixXd filters = triangle.solve(right);
        for (int step = 0; step < 2; ++step) {
          Eigen::MatrixXd rest = right - diagonal.asDiagonal() * filters;
          rest -= matrix.triangularView<Eigen::StrictlyUpper>() * filters;
          rest -= matrix.transpose().triangularView<Eigen::StrictlyLower>() * filters;
          filters += triangle.solve(rest);
        }
        return filters;
      }
      ridge = std::max(10 * ridge, 1e-15 * diagonal.maxCoeff());
    }
  }

  BssOptions options_;
  Eigen::MatrixXd all_, own_;  // [rows x taps, rows], [channels x taps, rows]: a column for each estimated channel
};

/// The second reading of a track: the scores of its frames.
template <Executor E = DefaultExecutor>
class BssFrames {
 public:
  explicit BssFrames(const BssFilters& filters, const E& executor = {})
      : options_(filters.options()),
        transform_(detail::fast_length(options_.window + options_.filter_length - 1), executor),
        references_(Eigen::MatrixXd::Zero(transform_.length(), options_.rows())),
        estimates_(references_) {
    const auto spectra = [&](Eigen::Index count, const auto& taps) {
      Eigen::MatrixXd padded = Eigen::MatrixXd::Zero(transform_.length(), count);
      for (Eigen::Index i = 0; i < count; ++i) padded.col(i).head(options_.filter_length) = taps(i);
      return transform_.forward(padded);
    };
    for (Eigen::Index estimate = 0; estimate < options_.rows(); ++estimate) {
      all_.push_back(spectra(options_.rows(), [&](Eigen::Index row) { return filters.of_all(row, estimate); }));
      own_.push_back(spectra(options_.channels, [&](Eigen::Index c) { return filters.of_own(c, estimate); }));
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

  /// Energies that the scores of a source are ratios of; they add up over its channels.
  struct Energies {
    double truth = 0, projected = 0, explained = 0, error = 0, spatial = 0, interference = 0, artifacts = 0;

    Energies& operator+=(const Energies& other) {
      for (double Energies::*energy : {&Energies::truth, &Energies::projected, &Energies::explained, &Energies::error,
                                       &Energies::spatial, &Energies::interference, &Energies::artifacts}) {
        this->*energy += other.*energy;
      }
      return *this;
    }
  };

  std::vector<BssScores> scores() {
    const Eigen::MatrixXcd references = transform_.forward(references_), estimates = transform_.forward(estimates_);
    std::vector<Energies> of_row(static_cast<std::size_t>(options_.rows()));
    transform_.executor().run(options_.rows(), [&](Eigen::Index row, int /*worker*/) {
      of_row[static_cast<std::size_t>(row)] = energies(references, estimates.col(row), row);
    });
    std::vector<BssScores> scores;
    for (Eigen::Index source = 0; source < options_.sources; ++source) {
      Energies sum;
      for (Eigen::Index c = 0; c < options_.channels; ++c) {
        sum += of_row[static_cast<std::size_t>(source * options_.channels + c)];
      }
      scores.push_back({decibels(sum.truth, sum.error), decibels(sum.truth, sum.spatial),
                        decibels(sum.projected, sum.interference), decibels(sum.explained, sum.artifacts)});
    }
    return scores;
  }

  /// The filtered signals are as long as the transform at most, so that by Parseval's theorem the energies of spectra
  /// are those of signals, and nothing is transformed back.
  Energies energies(const Eigen::MatrixXcd& references, const Eigen::VectorXcd& estimate, Eigen::Index row) const {
    const auto filtered = [&](const Eigen::MatrixXcd& filters, Eigen::Index first) {
      return Eigen::VectorXcd(filters.cwiseProduct(references.middleCols(first, filters.cols())).rowwise().sum());
    };
    const Eigen::VectorXcd own = filtered(own_[static_cast<std::size_t>(row)], row - row % options_.channels);
    const Eigen::VectorXcd all = filtered(all_[static_cast<std::size_t>(row)], 0);
    const auto truth = references.col(row);
    return {.truth = energy(truth),
            .projected = energy(own),
            .explained = energy(all),
            .error = energy(estimate - truth),
            .spatial = energy(own - truth),
            .interference = energy(all - own),
            .artifacts = energy(estimate - all)};
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
  detail::ParallelTransform<E> transform_;
  std::vector<Eigen::MatrixXcd> all_, own_;  // for each estimated channel [bins, rows], [bins, channels]
  Eigen::MatrixXd references_, estimates_;   // [length, rows], zeros behind the window
  Eigen::Index filled_ = 0, to_skip_ = 0;
  std::vector<BssFrame> frames_;
};

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
