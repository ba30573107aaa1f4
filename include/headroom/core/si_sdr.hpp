#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "headroom/core/same_shape.hpp"

namespace headroom::inline v0::core {

/// Scale-invariant SDR of one stem, collected block by block, as Music-Source-Separation-Training computes it: the
/// reference is scaled by a = (sum (e s + eps)) / (sum (s^2 + eps)) first, over channels x time, then
///
///   SI-SDR = 10 log10(sum (a s)^2 / (sum (a s - e)^2 + eps) + eps) dB,   eps = 1e-8.
///
/// (Le Roux, Wisdom, Erdogan, Hershey: "SDR - half-baked or well done?", where eps is 0.) A silent reference has -80
/// dB. A silent estimate is 0 / 0 in the definition, and what value() has then is made of eps alone.
class SiSdrAccumulator {
 public:
  /// Adds a block of the track, two matrices of one shape. Throws headroom.core.si_sdr.shape.
  template <class Reference, class Estimate>
  void add(const Eigen::MatrixBase<Reference>& reference, const Eigen::MatrixBase<Estimate>& estimate) {
    detail::check_same_shape("headroom.core.si_sdr.shape", reference, estimate);
    const auto s = reference.template cast<double>().array();
    const auto e = estimate.template cast<double>().array();
    reference_energy_ += s.square().sum();
    estimate_energy_ += e.square().sum();
    product_ += (s * e).sum();
    samples_ += static_cast<double>(reference.size());
  }

  /// In dB. The error is a difference of sums: above 140 dB it is rounding.
  double value() const {
    constexpr double kEpsilon = 1e-8;
    if (samples_ == 0) return 10 * std::log10(kEpsilon);
    const double scale = (product_ + samples_ * kEpsilon) / (reference_energy_ + samples_ * kEpsilon);
    const double signal = scale * scale * reference_energy_;
    const double error = signal - 2 * scale * product_ + estimate_energy_;
    return 10 * std::log10(signal / (std::max(error, 0.0) + kEpsilon) + kEpsilon);
  }

  /// Sum of s^2 so far, 0 for a silent reference.
  double reference_energy() const { return reference_energy_; }

 private:
  double reference_energy_ = 0, estimate_energy_ = 0, product_ = 0, samples_ = 0;
};

}  // namespace headroom::inline v0::core
