#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

#include "headroom/training/random.hpp"

namespace headroom::inline v0::training {

/// A filter of second order, y[n] = b0 x[n] + b1 x[n-1] + b2 x[n-2] - a1 y[n-1] - a2 y[n-2], with the coefficients of
/// Bristow-Johnson's Audio EQ Cookbook.
struct Biquad {
  double b0 = 1, b1 = 0, b2 = 0, a1 = 0, a2 = 0;
};

/// What a filter of an equalizer raises or lowers.
enum class Band { low_shelf, peak, high_shelf };

/// A filter whose gain is `decibels` at `frequency` (peak), or below (low shelf) or above it, where it has half of them
/// at `frequency`. `frequency` is below half of `sample_rate`, both in Hz. A peak has quality 1, a shelf slope 1.
inline Biquad make_biquad(Band band, double frequency, double decibels, double sample_rate) {
  const double A = std::pow(10, decibels / 40), w = 2 * std::numbers::pi * frequency / sample_rate;
  const double cosine = std::cos(w);
  double b0, b1, b2, a0, a1, a2;
  if (band == Band::peak) {
    const double alpha = std::sin(w) / 2;
    b0 = 1 + alpha * A, b1 = -2 * cosine, b2 = 1 - alpha * A;
    a0 = 1 + alpha / A, a1 = -2 * cosine, a2 = 1 - alpha / A;
  } else {
    const double s = band == Band::low_shelf ? 1 : -1;  // the shelves are mirror images: cos w becomes -cos w
    const double root = std::sqrt(2 * A) * std::sin(w), c = s * cosine;
    b0 = A * (A + 1 - (A - 1) * c + root), b2 = A * (A + 1 - (A - 1) * c - root);
    b1 = s * 2 * A * (A - 1 - (A + 1) * c);
    a0 = A + 1 + (A - 1) * c + root, a2 = A + 1 + (A - 1) * c - root;
    a1 = s * -2 * (A - 1 + (A + 1) * c);
  }
  return {b0 / a0, b1 / a0, b2 / a0, a1 / a0, a2 / a0};
}

/// Samples [C,n] after filters, one after the other, computed in double. They begin from silence.
inline torch::Tensor filtered(const torch::Tensor& samples, const std::vector<Biquad>& filters) {
  const torch::Tensor result = samples.to(torch::kFloat).contiguous().clone();
  for (std::int64_t c = 0; c < result.size(0); ++c) {
    float* const row = result[c].data_ptr<float>();
    std::vector<std::array<double, 2>> states(filters.size());  // transposed direct form II
    for (std::int64_t n = 0; n < result.size(1); ++n) {
      double x = row[n];
      for (std::size_t i = 0; i < filters.size(); ++i) {
        const auto& [b0, b1, b2, a1, a2] = filters[i];
        auto& [first, second] = states[i];
        const double y = b0 * x + first;
        first = b1 * x - a1 * y + second;
        second = b2 * x - a2 * y;
        x = y;
      }
      row[n] = static_cast<float>(x);
    }
  }
  return result;
}

/// A random equalizer: a low shelf, five peaks and a high shelf, each of a frequency between two of 40, 90, 200, 440,
/// 950, 2100, 4400 and 9500 Hz, evenly in octaves, and of a gain between two numbers of decibels. Bands that do not lie
/// below 0.45 of the sample rate are left out.
inline std::vector<Biquad> random_equalizer(const std::array<double, 2>& decibels, double sample_rate,
                                            SplitMix64& random) {
  constexpr std::array<double, 8> kEdges = {40, 90, 200, 440, 950, 2100, 4400, 9500};
  std::vector<Biquad> filters;
  for (std::size_t band = 0; band + 1 < kEdges.size(); ++band) {
    const double frequency = kEdges[band] * std::pow(kEdges[band + 1] / kEdges[band], random.uniform());
    const double gain = random.uniform(decibels[0], decibels[1]);
    if (kEdges[band + 1] > 0.45 * sample_rate) continue;
    const Band kind = band == 0 ? Band::low_shelf : band + 2 == kEdges.size() ? Band::high_shelf : Band::peak;
    filters.push_back(make_biquad(kind, frequency, gain, sample_rate));
  }
  return filters;
}

}  // namespace headroom::inline v0::training
