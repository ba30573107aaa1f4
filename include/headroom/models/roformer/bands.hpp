#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/mel.hpp"

// A band is a run of neighbouring frequency bins that make one token together.
namespace headroom::inline v0::models {

/// The bins first, …, first + count - 1.
struct Band {
  int64_t first = 0, count = 0;  ///< bins
  bool operator==(const Band&) const = default;
};

/// Bands side by side with so many bins each. Throws headroom.models.bands unless they are `bins` together.
inline std::vector<Band> adjacent_bands(const std::vector<int64_t>& sizes, int64_t bins) {
  std::vector<Band> bands;
  int64_t next = 0;
  for (const int64_t size : sizes) {
    require(size > 0, "headroom.models.bands", "a band has ", size, " bins, expected positive numbers");
    bands.push_back({next, size});
    next += size;
  }
  require(next == bins, "headroom.models.bands", "the bands have ", next, " bins together, and the spectrum has ", bins,
          "; give bands that add up to n_fft / 2 + 1");
  return bands;
}

/// How many bands each bin belongs to.
inline std::vector<int64_t> bands_per_bin(const std::vector<Band>& bands, int64_t bins) {
  std::vector<int64_t> counts(bins, 0);
  for (const auto& [first, count] : bands) {
    for (int64_t bin = first; bin < first + count; ++bin) ++counts[bin];
  }
  return counts;
}

/// The bands of Mel-Band RoFormer: those bins to which librosa's filters.mel(sr, n_fft, n_mels) gives a weight, and the
/// first and the last bin in any case. Neighbouring bands overlap: a band reaches from the middle of the one before it
/// to the middle of the one after it. Throws headroom.models.bands for so many bands that one of them has no bin, or
/// for so few that a bin is in none.
inline std::vector<Band> mel_bands(int64_t count, int64_t n_fft, int64_t sample_rate) {
  require(count > 1 && n_fft > 1 && sample_rate > 0, "headroom.models.bands", "got ", count, " mel bands, n_fft ",
          n_fft, " and sample rate ", sample_rate, "; expected two bands or more and positive numbers");
  const int64_t bins = n_fft / 2 + 1;
  std::vector<Band> bands;
  for (const core::MelBand& filter : core::mel_bands(static_cast<double>(sample_rate), n_fft, count)) {
    const auto i = static_cast<int64_t>(bands.size());
    int64_t first = filter.first, end = first + filter.weights.size();
    while (first < end && filter.weights(first - filter.first) == 0) ++first;
    while (first < end && filter.weights(end - 1 - filter.first) == 0) --end;
    if (i == 0) first = 0;
    if (i + 1 == count) first = std::min(first, bins - 1), end = bins;
    bands.push_back({first, end - first});
    require(first < end, "headroom.models.bands", "mel band ", i, " of ", count, " is narrower than a bin of n_fft ",
            n_fft, "; ask for fewer bands or a longer n_fft");
  }
  const std::vector<int64_t> counts = bands_per_bin(bands, bins);
  const auto lost = std::ranges::find(counts, 0);
  require(lost == counts.end(), "headroom.models.bands", "bin ", lost - counts.begin(), " is in none of the ", count,
          " mel bands; ask for more bands");
  return bands;
}

}  // namespace headroom::inline v0::models
