#pragma once

#include <torch/types.h>

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "headroom/audio/file.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/track_scores.hpp"

/// NAME.wav in `folder`, or NAME.flac where that one is there instead.
inline std::filesystem::path sound_of(const std::filesystem::path& folder, const std::string& name) {
  const std::filesystem::path wav = folder / (name + ".wav"), flac = folder / (name + ".flac");
  return !std::filesystem::exists(wav) && std::filesystem::exists(flac) ? flac : wav;
}

/// The files of a track: its true stems, the estimated ones, and its mixture, which is the sum of the true stems where
/// there is no file of it. Each is opened once and read a second at a time.
class TrackFiles {
 public:
  /// Throws headroom.evaluate.differs where files differ in length, channels or rate, and headroom.audio.file.*.
  TrackFiles(const std::filesystem::path& reference, const std::filesystem::path& estimate,
             const std::vector<std::string>& stems)
      : references_(open(reference, stems)), estimates_(open(estimate, stems)) {
    if (std::filesystem::exists(sound_of(reference, "mixture"))) mixture_ = open(reference, {"mixture"});
    for (const auto* const readers : {&references_, &estimates_, &mixture_}) {
      for (const headroom::audio::AudioReader& reader : *readers) require_shape_of_first(reader);
    }
  }

  /// Throws headroom.evaluate.length where the track is too short for some metric.
  void require_length(const headroom::core::TrackOptions& options) const {
    headroom::require(first().frames() >= options.least_samples(), "headroom.evaluate.length", first().path(), " has ",
                      first().frames(), " samples, and l1_freq needs ", options.least_samples(),
                      "; leave the track out, or that metric");
  }

  /// For score_track; `metrics` is set by the caller.
  headroom::core::TrackOptions options() const {
    return {.sources = static_cast<Eigen::Index>(references_.size()),
            .channels = first().channels(),
            .sample_rate = static_cast<double>(first().sample_rate())};
  }

  /// Calls `on_block` with one second after the other, from the beginning on. Throws headroom.audio.file.*.
  template <class F>
  void read(F&& on_block) {
    for (auto* const readers : {&references_, &estimates_, &mixture_}) {
      for (headroom::audio::AudioReader& reader : *readers) {
        if (reader.position() > 0) reader.seek(0);
      }
    }
    while (first().position() < first().frames()) {
      headroom::core::TrackBlock block{read_second(references_), read_second(estimates_), read_second(mixture_)};
      if (mixture_.empty()) {
        block.mixture = block.references.topRows(first().channels());
        for (Eigen::Index row = block.mixture.rows(); row < block.references.rows(); row += block.mixture.rows()) {
          block.mixture += block.references.middleRows(row, block.mixture.rows());
        }
      }
      on_block(block);
    }
  }

 private:
  using Readers = std::vector<headroom::audio::AudioReader>;

  static Readers open(const std::filesystem::path& folder, const std::vector<std::string>& names) {
    Readers readers;
    for (const std::string& name : names) readers.emplace_back(sound_of(folder, name));
    return readers;
  }

  const headroom::audio::AudioReader& first() const { return references_.front(); }

  void require_shape_of_first(const headroom::audio::AudioReader& reader) const {
    headroom::require(reader.channels() == first().channels() && reader.frames() == first().frames() &&
                          reader.sample_rate() == first().sample_rate(),
                      "headroom.evaluate.differs", reader.path(), " has ", reader.channels(), " channels, ",
                      reader.frames(), " frames, ", reader.sample_rate(), " Hz, expected ", first().channels(), ", ",
                      first().frames(), ", ", first().sample_rate(), " like ", first().path(),
                      "; separate the track again from its mixture.wav");
  }

  /// [readers x channels, n]
  static Eigen::MatrixXf read_second(Readers& readers) {
    using Samples = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    Eigen::MatrixXf block;
    Eigen::Index row = 0;
    for (headroom::audio::AudioReader& reader : readers) {
      const torch::Tensor samples = reader.read(reader.sample_rate());  // [C,n]
      if (row == 0) block.resize(samples.size(0) * static_cast<Eigen::Index>(readers.size()), samples.size(1));
      block.middleRows(row, samples.size(0)) =
          Eigen::Map<const Samples>(samples.const_data_ptr<float>(), samples.size(0), samples.size(1));
      row += samples.size(0);
    }
    return block;
  }

  Readers references_, estimates_, mixture_;
};

/// Names of the tracks below `reference`; "" stands for the folder itself. A track has a mixture or all stems.
/// Throws headroom.evaluate.empty where there is none.
inline std::vector<std::string> find_tracks(const std::filesystem::path& reference,
                                            const std::vector<std::string>& stems) {
  const auto is_track = [&](const std::filesystem::path& folder) {
    const auto has = [&](const std::string& name) { return std::filesystem::exists(sound_of(folder, name)); };
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
