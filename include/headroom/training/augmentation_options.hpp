#pragma once

#include <array>
#include <vector>

namespace headroom::inline v0::training {

/// Random changes of a stem. A number that stands alone is a probability; a pair is what is drawn between.
struct AugmentationOptions {
  std::array<double, 2> gain = {0.25, 1.25};  ///< factor
  bool swap_channels = true;                  ///< reverse the order of the channels of half of the stems
  bool flip_polarity = true;                  ///< negate half of the stems
  std::vector<double> mixup = {};             ///< of each further segment of the same stem: the stem is their mean
  double equalizer = 0;                       ///< see random_equalizer
  std::array<double, 2> equalizer_db = {-6, 6};
  double pitch = 0;
  std::array<double, 2> pitch_semitones = {-2, 2};
  double tempo = 0;
  std::array<double, 2> tempo_factor = {0.9, 1.1};  ///< 2: twice as fast
  double noise = 0;                                 ///< white and Gaussian, in the stem and so in the mixture
  std::array<double, 2> noise_db = {-70, -40};      ///< its RMS, full scale is 0 dB
};

}  // namespace headroom::inline v0::training
