#pragma once

#include <Eigen/Core>
#include <cmath>

#include "headroom/core/error.hpp"
#include "headroom/core/same_shape.hpp"

namespace headroom::inline v0::core {

/// Signal-to-distortion ratio of one stem, collected block by block, so that a whole track never has to be in memory:
///
///   nSDR = 10 log10((sum s^2 + eps) / (sum (s - e)^2 + eps)) dB,   s reference, e estimate, over channels x time.
///
/// The "new SDR" of the Music Demixing Challenge 2021 (Mitsufuji et al.), also called uSDR: no projection and no
/// filter, so gain errors count. Sums are kept in double whatever the samples are.
///
/// An estimate of silence has 0 dB and a perfect one 10 log10(sum s^2 / eps + 1). Where the reference is silent the
/// value is defined, -10 log10(sum e^2 / eps + 1), but it measures how loud the estimate is relative to eps and not how
/// good: look at reference_energy() and leave such tracks out of a mean.
class NsdrAccumulator {
 public:
  /// Throws headroom.core.nsdr.epsilon unless epsilon > 0.
  explicit NsdrAccumulator(double epsilon = 1e-8) : epsilon_(epsilon) {
    require(epsilon > 0, "headroom.core.nsdr.epsilon", "got epsilon ", epsilon,
            "; expected a positive number such as 1e-8, which keeps silence out of the logarithm");
  }

  /// Adds a block of the track. Any two Eigen matrices, vectors or maps of one shape, real, in any layout.
  /// Throws headroom.core.nsdr.shape.
  template <class Reference, class Estimate>
  void add(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
    detail::check_same_shape("headroom.core.nsdr.shape", reference, estimate);
    reference_energy_ += reference.template cast<double>().squaredNorm();
    error_energy_ += (reference.template cast<double>() - estimate.template cast<double>()).squaredNorm();
  }

  /// Ratio in dB of all that was added; 0 when nothing was.
  double value() const { return 10.0 * std::log10((reference_energy_ + epsilon_) / (error_energy_ + epsilon_)); }

  /// Sum of s^2 so far, 0 for a silent reference.
  double reference_energy() const { return reference_energy_; }

 private:
  double epsilon_;
  double reference_energy_ = 0;
  double error_energy_ = 0;
};

}  // namespace headroom::inline v0::core
