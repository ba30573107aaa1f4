#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "headroom/training/dataset.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

/// What a configuration draws from a data set.
inline MusdbOptions dataset_options(const Config& config) {
  return {.segment_length = config.training.segment_length,
          .channels = config.audio.channels,
          .sample_rate = config.audio.sample_rate,
          .stems = config.audio.stems,
          .accompaniment = config.data.accompaniment,
          .draw = config.data.draw == "uniform" ? TrackDraw::uniform : TrackDraw::by_length,
          .remix = config.data.remix,
          .gain = config.data.gain,
          .swap_channels = config.data.swap_channels,
          .flip_polarity = config.data.flip_polarity};
}

/// Examples of one split of a data set: a source of batches.
struct Split {
  MusdbDataset dataset;
  uint64_t seed;

  Example operator()(int64_t first, int64_t count) const { return dataset.batch(seed, first, count); }
};

/// What a configuration trains on: the folder `train` in `data`. Throws headroom.training.dataset.*.
inline Split training_split(const std::filesystem::path& data, const Config& config) {
  return {MusdbDataset(data / "train", dataset_options(config)), static_cast<uint64_t>(config.training.seed)};
}

/// What a model is validated on, the folder `valid` in `data`: music as it is, the same segments each time. None where
/// there is no such folder. Throws headroom.training.dataset.*.
inline std::optional<Split> validation_split(const std::filesystem::path& data, const Config& config) {
  if (!std::filesystem::is_directory(data / "valid")) return std::nullopt;
  MusdbOptions options = dataset_options(config);
  options.remix = 0;
  return Split{MusdbDataset(data / "valid", options), 0};
}

}  // namespace headroom::inline v0::training
