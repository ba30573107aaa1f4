#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <unsupported/Eigen/FFT>

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
class RealTransform {
 public:
  explicit RealTransform(Eigen::Index length) : length_(length) { fft_.SetFlag(Eigen::FFT<double>::HalfSpectrum); }

  Eigen::Index length() const { return length_; }
  Eigen::Index bins() const { return length_ / 2 + 1; }

  /// [bins, n] of [length, n]
  Eigen::MatrixXcd forward(const Eigen::MatrixXd& signals) {
    Eigen::MatrixXcd spectra(bins(), signals.cols());
    for (Eigen::Index i = 0; i < signals.cols(); ++i) {
      fft_.fwd(spectra.col(i).data(), signals.col(i).data(), static_cast<int>(length_));
    }
    return spectra;
  }
  Eigen::VectorXd inverse(const Eigen::VectorXcd& spectrum) {
    Eigen::VectorXd signal(length_);
    fft_.inv(signal.data(), spectrum.data(), static_cast<int>(length_));
    return signal;
  }

 private:
  Eigen::Index length_;
  Eigen::FFT<double> fft_;
};

}  // namespace headroom::inline v0::core::detail
