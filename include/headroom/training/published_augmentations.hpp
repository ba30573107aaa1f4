#pragma once

#include <array>

namespace headroom::inline v0::training::detail {

/// A random change of stems: what it is called in augmentations.all, its bounds there, and here.
struct PublishedChange {
  const char *theirs, *least, *greatest;
  const char *ours, *unit;
  std::array<double, 2> otherwise;  ///< bounds where the file has none
};
inline constexpr PublishedChange kPublishedChanges[] = {
    {"seven_band_parametric_eq", "min_gain_db", "max_gain_db", "equalizer", "db", {-12, 12}},
    {"pitch_shift", "min_semitones", "max_semitones", "pitch", "semitones", {-5, 5}},
    {"time_stretch", "min_rate", "max_rate", "tempo", "factor", {0.8, 1.25}},
    {"gaussian_noise", "min_amplitude", "max_amplitude", "noise", "db", {0.001, 0.015}},
};

}  // namespace headroom::inline v0::training::detail
