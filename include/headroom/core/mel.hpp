#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <vector>

namespace headroom::inline v0::core {

/// A band of a mel filter bank: what the bins from `first` on are weighted with; no weights where the band lies between
/// two bins.
struct MelBand {
  Eigen::Index first = 0;
  Eigen::VectorXd weights = {};
};

namespace detail {

/// Slaney's scale: linear up to 1 kHz, 15 mel, then logarithmic.
inline double mel_to_hertz(double mel) {
  return mel < 15 ? mel * 200 / 3 : 1000 * std::exp((mel - 15) * std::log(6.4) / 27);
}
inline double hertz_to_mel(double hertz) {
  return hertz < 1000 ? hertz * 3 / 200 : 15 + 27 * std::log(hertz / 1000) / std::log(6.4);
}

}  // namespace detail

/// Triangles over the bins of a transform of n_fft samples, from 0 to half the sample rate, each with the same area:
/// librosa.filters.mel(sr, n_fft, n_mels).
inline std::vector<MelBand> mel_bands(double sample_rate, Eigen::Index n_fft, Eigen::Index bands) {
  const double highest = detail::hertz_to_mel(sample_rate / 2);
  const auto corner = [&](Eigen::Index i) {
    return detail::mel_to_hertz(highest * static_cast<double>(i) / static_cast<double>(bands + 1));
  };
  const double step = sample_rate / static_cast<double>(n_fft);
  std::vector<MelBand> filters;
  for (Eigen::Index band = 0; band < bands; ++band) {
    const double low = corner(band), centre = corner(band + 1), high = corner(band + 2);
    const auto first = static_cast<Eigen::Index>(std::ceil(low / step));
    const auto last = std::min(static_cast<Eigen::Index>(std::floor(high / step)), n_fft / 2);
    MelBand filter{.first = first};
    filter.weights = Eigen::VectorXd::Zero(std::max<Eigen::Index>(last - first + 1, 0));
    for (Eigen::Index i = 0; i < filter.weights.size(); ++i) {
      const double hertz = static_cast<double>(first + i) * step;
      const double height = std::min((hertz - low) / (centre - low), (high - hertz) / (high - centre));
      filter.weights(i) = std::max(height, 0.0) * 2 / (high - low);
    }
    filters.push_back(filter);
  }
  return filters;
}

}  // namespace headroom::inline v0::core
