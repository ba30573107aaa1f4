#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "headroom/training/augmentation_options.hpp"
#include "headroom/training/equalizer.hpp"
#include "headroom/training/random.hpp"
#include "headroom/training/stretch.hpp"

namespace headroom::inline v0::training {

/// Throws headroom.training.dataset.options and headroom.training.augmentation.rubberband.
inline void check(const AugmentationOptions& options) {
  constexpr auto id = "headroom.training.dataset.options";
  const auto probability = [&](const char* name, double value) {
    require(value >= 0 && value <= 1, id, name, " is ", value, ", expected a probability");
  };
  const auto range = [&](const char* name, const std::array<double, 2>& pair, double at_least, double at_most) {
    require(at_least <= pair[0] && pair[0] <= pair[1] && pair[1] <= at_most, id, name, " is ", pair[0], " to ", pair[1],
            ", expected ", at_least, " <= least <= greatest <= ", at_most);
  };
  range("gain", options.gain, 0, 1e30);
  for (const double value : options.mixup) probability("mixup", value);
  probability("equalizer", options.equalizer);
  range("equalizer_db", options.equalizer_db, -40, 40);
  probability("pitch", options.pitch);
  range("pitch_semitones", options.pitch_semitones, -24, 24);
  probability("tempo", options.tempo);
  range("tempo_factor", options.tempo_factor, 0.25, 4);
  probability("noise", options.noise);
  range("noise_db", options.noise_db, -200, 0);
  if (options.pitch > 0 || options.tempo > 0) require_rubberband();
}

/// The random changes of one segment of a stem. Each change has a sequence of numbers for its own: to turn one on or
/// off changes none of the others.
class Augmentation {
 public:
  /// `random` decides about gain, channels and polarity, and the sequence that `seed` stands for about the rest. The
  /// options have to outlive it.
  Augmentation(const AugmentationOptions& options, SplitMix64& random, std::uint64_t seed)
      : options_(options), seeds_(seed) {
    swapped_ = random.coin();
    flipped_ = random.coin();
    gain_ = random.uniform(options.gain[0], options.gain[1]);
    equalizer_ = SplitMix64(seeds_.next());
    pitch_ = SplitMix64(seeds_.next());
    tempo_ = SplitMix64(seeds_.next());
    noise_ = SplitMix64(seeds_.next());
    if (pitch_.uniform() < options.pitch) stretch_.semitones = between(pitch_, options.pitch_semitones);
    if (tempo_.uniform() < options.tempo) stretch_.tempo = between(tempo_, options.tempo_factor);
  }

  /// Takes tempo and pitch of another, so that both segments stay in time and in tune.
  void stretch_like(const Augmentation& other) { stretch_ = other.stretch_; }
  const Stretch& stretch() const { return stretch_; }

  /// Samples of a track that become `length` samples, of a track that has at least these; in one that is too short for
  /// the tempo, the music is less fast.
  std::int64_t source_length(std::int64_t length, std::int64_t track_frames) {
    stretch_.tempo = std::min(stretch_.tempo, static_cast<double>(track_frames) / static_cast<double>(length));
    return static_cast<std::int64_t>(std::ceil(static_cast<double>(length) * stretch_.tempo - 1e-6));
  }

  /// `length` samples [C,length] of those that source_length asked for.
  torch::Tensor apply(torch::Tensor samples, std::int64_t length, std::int64_t sample_rate) {
    if (stretch_.changes()) samples = stretched(samples, stretch_, length, sample_rate);
    if (equalizer_.uniform() < options_.equalizer) {
      samples =
          filtered(samples, random_equalizer(options_.equalizer_db, static_cast<double>(sample_rate), equalizer_));
    }
    if (noise_.uniform() < options_.noise) samples = noisy(samples, between(noise_, options_.noise_db));
    if (options_.swap_channels && swapped_) samples = samples.flip(0);
    return samples * (options_.flip_polarity && flipped_ ? -gain_ : gain_);
  }

 private:
  static double between(SplitMix64& random, const std::array<double, 2>& pair) {
    return random.uniform(pair[0], pair[1]);
  }

  torch::Tensor noisy(const torch::Tensor& samples, double decibels) {
    const double rms = std::pow(10, decibels / 20);
    const torch::Tensor noise = torch::empty(samples.sizes());
    float* const values = noise.data_ptr<float>();
    for (std::int64_t i = 0; i < noise.numel(); ++i) values[i] = static_cast<float>(rms * noise_.normal());
    return samples + noise;
  }

  const AugmentationOptions& options_;
  SplitMix64 seeds_, equalizer_{0}, pitch_{0}, tempo_{0}, noise_{0};
  bool swapped_ = false, flipped_ = false;
  double gain_ = 1;
  Stretch stretch_;
};

}  // namespace headroom::inline v0::training
