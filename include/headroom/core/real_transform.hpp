#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <complex>
#include <cstddef>
#include <unsupported/Eigen/FFT>
#include <vector>

#include "headroom/core/executor.hpp"

namespace headroom::inline v0::core::detail {

/// The smallest even length from `least` on that has no prime factor above 5: those are fast to transform.
inline Eigen::Index fast_length(Eigen::Index least) {
  for (Eigen::Index length = std::max<Eigen::Index>(least + least % 2, 2);; length += 2) {
    Eigen::Index rest = length;
    for (const Eigen::Index factor : {2, 3, 5}) {
      while (rest % factor == 0) rest /= factor;
    }
    if (rest == 1) return length;
  }
}

/// Fourier transforms of real signals of one length, a column each; the bins from 0 to half the rate.
template <class Scalar>
class RealTransformOf {
 public:
  using Signals = Eigen::MatrixX<Scalar>;
  using Spectra = Eigen::MatrixX<std::complex<Scalar>>;

  explicit RealTransformOf(Eigen::Index length) : length_(length) { fft_.SetFlag(Eigen::FFT<Scalar>::HalfSpectrum); }

  Eigen::Index length() const { return length_; }
  Eigen::Index bins() const { return length_ / 2 + 1; }

  /// [bins, n] of [length, n]
  Spectra forward(const Signals& signals) {
    Spectra spectra(bins(), signals.cols());
    for (Eigen::Index i = 0; i < signals.cols(); ++i) forward(signals.col(i).data(), spectra.col(i).data());
    return spectra;
  }
  /// bins() numbers from length() samples
  void forward(const Scalar* signal, std::complex<Scalar>* spectrum) {
    fft_.fwd(spectrum, signal, static_cast<int>(length_));
  }
  Eigen::VectorX<Scalar> inverse(const Eigen::VectorX<std::complex<Scalar>>& spectrum) {
    Eigen::VectorX<Scalar> signal(length_);
    fft_.inv(signal.data(), spectrum.data(), static_cast<int>(length_));
    return signal;
  }

 private:
  Eigen::Index length_;
  Eigen::FFT<Scalar> fft_;
};

using RealTransform = RealTransformOf<double>;

/// The transforms of many signals on the threads of an executor.
template <Executor E>
class ParallelTransform {
 public:
  ParallelTransform(Eigen::Index length, const E& executor)
      : executor_(executor), of_worker_(static_cast<std::size_t>(executor.workers()), RealTransform(length)) {}

  Eigen::Index length() const { return of_worker_.front().length(); }
  Eigen::Index bins() const { return of_worker_.front().bins(); }
  const E& executor() const { return executor_; }

  /// [bins, n] of [length, n]
  Eigen::MatrixXcd forward(const Eigen::MatrixXd& signals) {
    Eigen::MatrixXcd spectra(bins(), signals.cols());
    executor_.run(signals.cols(), [&](Eigen::Index i, int worker) {
      of_worker_[static_cast<std::size_t>(worker)].forward(signals.col(i).data(), spectra.col(i).data());
    });
    return spectra;
  }

 private:
  E executor_;
  std::vector<RealTransform> of_worker_;
};

}  // namespace headroom::inline v0::core::detail
