#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <complex>

#include "headroom/core/error.hpp"
#include "headroom/core/executor.hpp"
#include "headroom/core/real_transform.hpp"

namespace headroom::inline v0::core {

/// What BSSEval v4 compares, and in what pieces.
struct BssOptions {
  Eigen::Index sources = 4, channels = 2;
  Eigen::Index window = 44100, hop = 44100;  ///< of frames, in samples; museval's tools take one second
  Eigen::Index filter_length = 512;          ///< taps

  /// Channels of all sources together.
  Eigen::Index rows() const { return sources * channels; }

  /// Throws headroom.core.bsseval.options.
  void check() const {
    require(sources >= 1 && channels >= 1 && window >= 1 && hop >= 1 && filter_length >= 1,
            "headroom.core.bsseval.options", "got ", sources, " sources, ", channels, " channels, window ", window,
            ", hop ", hop, ", ", filter_length, " taps; expected at least 1 of each");
  }
};

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

/// Sums of products of spectra, [bins] a column. They are kept in long double: of real music the equations are so ill
/// conditioned that what sums in double lose at the loudest bins shows in scores of 40 dB.
class ProductSums {
 public:
  ProductSums(Eigen::Index bins, Eigen::Index columns)
      : real_(Eigen::MatrixX<long double>::Zero(bins, columns)), imaginary_(real_) {}

  /// column += a conj(b)
  void add(Eigen::Index column, const std::complex<double>* a, const std::complex<double>* b) {
    long double *const real = real_.col(column).data(), *const imaginary = imaginary_.col(column).data();
    for (Eigen::Index bin = 0; bin < real_.rows(); ++bin) {
      const long double a_real = a[bin].real(), a_imaginary = a[bin].imag();
      real[bin] += a_real * b[bin].real() + a_imaginary * b[bin].imag();
      imaginary[bin] += a_imaginary * b[bin].real() - a_real * b[bin].imag();
    }
  }
  /// The correlation whose spectrum a column is.
  Eigen::VectorXd correlation(Eigen::Index column, RealTransformOf<long double>& transform) const {
    Eigen::VectorX<std::complex<long double>> spectrum(real_.rows());
    spectrum.real() = real_.col(column);
    spectrum.imag() = imaginary_.col(column);
    return transform.inverse(spectrum).template cast<double>();
  }

 private:
  Eigen::MatrixX<long double> real_, imaginary_;
};

}  // namespace detail

/// The first reading of a track: how much true sources correlate with each other and with the estimates, at every
/// delay of the filters.
template <Executor E = DefaultExecutor>
class BssCorrelations {
 public:
  /// Throws headroom.core.bsseval.options.
  explicit BssCorrelations(const BssOptions& options, const E& executor = {})
      : options_(options),
        transform_(transform_length(options), executor),
        inverse_(transform_.length()),
        among_references_(transform_.bins(), options.rows() * options.rows()),
        with_estimates_(among_references_),
        signals_(Eigen::MatrixXd::Zero(transform_.length(), 3 * options.rows())) {}

  const BssOptions& options() const { return options_; }

  /// Adds a block of any length, [sources x channels, samples], the channels of a source one after the other.
  /// Throws headroom.core.bsseval.shape.
  template <class References, class Estimates>
  void add(const Eigen::MatrixBase<References>& references, const Eigen::MatrixBase<Estimates>& estimates) {
    detail::check_bss_block(references, estimates, options_);
    for (Eigen::Index done = 0; done < references.cols();) {
      const Eigen::Index count = std::min(references.cols() - done, transform_.length() - filled_);
      const Eigen::MatrixXd added = references.middleCols(done, count).transpose().template cast<double>();
      auto block = signals_.middleRows(filled_, count);
      block << added, added, estimates.middleCols(done, count).transpose().template cast<double>();
      filled_ += count;
      done += count;
      if (filled_ == transform_.length()) take_block();
    }
  }

  /// sum of rows `first` at n and `second` at n - delay, for delays from 0 to filter_length - 1. `first` is a true
  /// source, or with `of_estimate` an estimated one. To be called after all that is added.
  Eigen::VectorXd correlation(Eigen::Index first, Eigen::Index second, bool of_estimate) {
    if (filled_ > history()) take_block();
    const detail::ProductSums& sums = of_estimate ? with_estimates_ : among_references_;
    return sums.correlation(first * options_.rows() + second, inverse_).head(options_.filter_length);
  }

 private:
  static Eigen::Index transform_length(const BssOptions& options) {
    options.check();
    return detail::fast_length(std::max<Eigen::Index>(8192, 4 * options.filter_length));
  }
  Eigen::Index history() const { return options_.filter_length - 1; }

  /// A block stands behind the last samples of the one before, so that delays reach back; its spectrum without them
  /// against the spectrum with them counts each pair of samples once.
  void take_block() {
    const Eigen::Index rows = options_.rows();
    signals_.bottomRows(transform_.length() - filled_).setZero();
    const Eigen::MatrixXcd spectra = transform_.forward(signals_);
    const auto delayed = spectra.leftCols(rows), present = spectra.middleCols(rows, rows);
    const auto estimated = spectra.rightCols(rows);
    transform_.executor().run(rows, [&](Eigen::Index first, int /*worker*/) {
      for (Eigen::Index second = 0; second < rows; ++second) {
        const Eigen::Index column = first * rows + second;
        among_references_.add(column, present.col(first).data(), delayed.col(second).data());
        with_estimates_.add(column, estimated.col(first).data(), delayed.col(second).data());
      }
    });
    signals_.topLeftCorner(history(), rows) = signals_.block(filled_ - history(), 0, history(), rows).eval();
    filled_ = history();
  }

  BssOptions options_;
  detail::ParallelTransform<E> transform_;
  detail::RealTransformOf<long double> inverse_;
  detail::ProductSums among_references_, with_estimates_;  // [bins, rows x rows]
  Eigen::MatrixXd signals_;  // [length, 3 x rows]: references behind their history, without it, and estimates
  Eigen::Index filled_ = options_.filter_length - 1;
};

}  // namespace headroom::inline v0::core
