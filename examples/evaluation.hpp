#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "headroom/audio/file.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/core/error.hpp"

/// dB of each stem, and "mean" over the stems. Nothing where the true stem is silent: the ratio says nothing then.
using Scores = std::map<std::string, std::optional<double>>;

/// What the estimated stems of a track reach, and two estimators that need no model: silence (always 0 dB) and the
/// mixture itself.
struct TrackScores {
  Scores estimate, silence, mixture;
};

inline void require_same_shape(const headroom::audio::AudioReader& reader,
                               const headroom::audio::AudioReader& reference) {
  headroom::require(reader.channels() == reference.channels() && reader.frames() == reference.frames() &&
                        reader.sample_rate() == reference.sample_rate(),
                    "headroom.evaluate.differs", reader.path(), " has ", reader.channels(), " channels, ",
                    reader.frames(), " frames, ", reader.sample_rate(), " Hz, expected ", reference.channels(), ", ",
                    reference.frames(), ", ", reference.sample_rate(), " like ", reference.path(),
                    "; separate the track again from its mixture.wav");
}

/// Over the values that are there.
inline std::optional<double> mean_of(const std::vector<std::optional<double>>& values) {
  double sum = 0, count = 0;
  for (const auto& value : values) {
    sum += value.value_or(0);
    count += value.has_value();
  }
  return count > 0 ? std::optional(sum / count) : std::nullopt;
}

inline void add_mean(Scores& scores) {
  std::vector<std::optional<double>> values;
  for (const auto& [stem, value] : scores) {
    values.push_back(value);
  }
  scores["mean"] = mean_of(values);
}

/// A track's mixture: mixture.wav, or the sum of the stems where there is none.
class Mixture {
 public:
  Mixture(const std::filesystem::path& track, const std::vector<std::string>& stems,
          const headroom::audio::AudioReader& like) {
    std::vector<std::string> files = {"mixture"};
    if (!std::filesystem::exists(track / "mixture.wav")) files = stems;
    for (const std::string& file : files) {
      readers_.emplace_back(track / (file + ".wav"));
      require_same_shape(readers_.back(), like);
    }
  }

  torch::Tensor read(std::int64_t frames) {  // [C,n]
    torch::Tensor sum = readers_.front().read(frames);
    for (std::size_t i = 1; i < readers_.size(); ++i) sum += readers_[i].read(frames);
    return sum;
  }

 private:
  std::vector<headroom::audio::AudioReader> readers_;
};

/// Scores of a track from its folder with the true stems and one with estimates, read a second at a time. Throws
/// headroom.evaluate.differs where files of a track differ in length, channels or rate, and headroom.audio.file.*.
inline TrackScores evaluate_track(const std::filesystem::path& reference, const std::filesystem::path& estimate,
                                  const std::vector<std::string>& stems) {
  TrackScores scores;
  for (const std::string& stem : stems) {
    headroom::audio::AudioReader truth(reference / (stem + ".wav")), guess(estimate / (stem + ".wav"));
    require_same_shape(guess, truth);
    Mixture mixture(reference, stems, truth);
    headroom::audio::NsdrAccumulator of_guess, of_silence, of_mixture;
    while (truth.position() < truth.frames()) {
      const torch::Tensor s = truth.read(truth.sample_rate());  // [C,n]
      headroom::audio::add(of_guess, s, guess.read(s.size(1)));
      headroom::audio::add(of_silence, s, torch::zeros_like(s));
      headroom::audio::add(of_mixture, s, mixture.read(s.size(1)));
    }
    const auto value = [&](const headroom::audio::NsdrAccumulator& of) {
      return of_silence.reference_energy() > 0 ? std::optional(of.value()) : std::nullopt;
    };
    scores.estimate[stem] = value(of_guess);
    scores.silence[stem] = value(of_silence);
    scores.mixture[stem] = value(of_mixture);
  }
  add_mean(scores.estimate);
  add_mean(scores.silence);
  add_mean(scores.mixture);
  return scores;
}

/// The mean of each column over tracks of the same stems, without those that are silent.
inline Scores mean_over_tracks(const std::vector<TrackScores>& tracks, Scores TrackScores::*estimator) {
  Scores means;
  for (const auto& [column, ignored] : tracks.front().*estimator) {
    std::vector<std::optional<double>> values;
    for (const TrackScores& track : tracks) {
      values.push_back((track.*estimator).at(column));
    }
    means[column] = mean_of(values);
  }
  return means;
}

/// Names of the tracks below `reference`; "" stands for the folder itself. A track has a mixture or all stems.
/// Throws headroom.evaluate.empty where there is none.
inline std::vector<std::string> find_tracks(const std::filesystem::path& reference,
                                            const std::vector<std::string>& stems) {
  const auto is_track = [&](const std::filesystem::path& folder) {
    const auto has = [&](const std::string& name) { return std::filesystem::exists(folder / (name + ".wav")); };
    return has("mixture") || std::ranges::all_of(stems, has);
  };
  if (is_track(reference)) {
    return {""};
  }
  std::vector<std::string> names;
  std::error_code failure;
  for (const auto& entry : std::filesystem::directory_iterator(reference, failure)) {
    if (is_track(entry.path())) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::ranges::sort(names);
  headroom::require(
      !names.empty(), "headroom.evaluate.empty", "no tracks in ", reference, failure ? ": " + failure.message() : "",
      ", expected mixture.wav or all stems in it or in its folders; give a track or a split, e.g. musdb18hq/test");
  return names;
}
