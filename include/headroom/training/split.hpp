#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/training/choice.hpp"
#include "headroom/training/data_choices.hpp"
#include "headroom/training/data_section.hpp"
#include "headroom/training/dataset.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/prefetch.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/track_list.hpp"

namespace headroom::inline v0::training {

/// What a configuration draws from a data set. Throws headroom.training.config for a word that is none of the choices.
inline DatasetOptions dataset_options(const Config& config) {
  const DataConfig& data = config.data;
  return {.segment_length = config.training.segment_length,
          .channels = config.audio.channels,
          .sample_rate = config.audio.sample_rate,
          .stems = config.audio.stems,
          .accompaniment = data.accompaniment,
          .layout = chosen<Layout>(kLayoutNames, data.layout),
          .weights = data.weights,
          .missing = chosen<MissingStem>(kMissingStemNames, data.missing),
          .leave_out_damaged = data.damaged == "leave_out",
          .convert = data.convert,
          .draw = chosen<TrackDraw>(kTrackDrawNames, data.draw),
          .remix = data.remix,
          .augmentation = static_cast<const AugmentationOptions&>(data),
          .augment_aligned = data.augment_aligned};
}

/// Examples of one split of a data set: a source of batches.
struct Split {
  Dataset dataset;
  uint64_t seed;

  Example operator()(int64_t first, int64_t count) const { return dataset.batch(seed, first, count); }
};

namespace detail {

/// The split of a data set, ROOT/NAME or ROOT/NAME.csv; none where there is neither.
inline std::optional<std::filesystem::path> part_of(const std::filesystem::path& root, const std::string& name) {
  if (std::filesystem::is_directory(root / name)) return root / name;
  const std::filesystem::path table = root / (name + ".csv");
  return std::filesystem::is_regular_file(table) ? std::optional(table) : std::nullopt;
}

/// The data sets of a configuration.
inline std::vector<std::filesystem::path> roots_of(const std::filesystem::path& data, const Config& config) {
  std::vector<std::filesystem::path> roots = {data};
  roots.insert(roots.end(), config.data.more_paths.begin(), config.data.more_paths.end());
  return roots;
}

}  // namespace detail

/// What a configuration trains on: `train` or `train.csv` in `data` and in each of data.more_paths, or these themselves
/// where neither is there. Throws headroom.training.dataset.*.
inline Split training_split(const std::filesystem::path& data, const Config& config) {
  std::vector<std::filesystem::path> roots = detail::roots_of(data, config);
  for (std::filesystem::path& root : roots) root = detail::part_of(root, "train").value_or(root);
  return {Dataset(roots, dataset_options(config)), static_cast<uint64_t>(config.training.seed)};
}

/// What a model is validated on, `valid` in `data` and in data.more_paths: music as it is, the same segments each time.
/// None where there is no such folder. Throws headroom.training.dataset.*.
inline std::optional<Split> validation_split(const std::filesystem::path& data, const Config& config) {
  std::vector<std::filesystem::path> roots;
  for (const std::filesystem::path& root : detail::roots_of(data, config)) {
    if (auto part = detail::part_of(root, "valid")) roots.push_back(std::move(*part));
  }
  if (roots.empty()) return std::nullopt;
  DatasetOptions options = dataset_options(config);
  options.remix = 0;
  options.augment_aligned = false;
  options.weights.clear();
  options.layout = Layout::automatic;
  return Split{Dataset(roots, options), 0};
}

/// How a configuration has examples read ahead.
inline PrefetchOptions prefetch_options(const TrainingConfig& training) {
  return {.examples = training.read_ahead * training.batch_size, .threads = training.reader_threads};
}

/// Bytes that examples take which are read ahead, and those that are being read: each reader holds about two more while
/// it puts one together.
inline std::int64_t read_ahead_bytes(const Config& config) {
  const PrefetchOptions options = prefetch_options(config.training);
  if (options.examples == 0 || options.threads == 0) return 0;
  const std::int64_t signals = static_cast<std::int64_t>(config.audio.stems.size()) + 1;
  const std::int64_t example = signals * config.audio.channels * config.training.segment_length * 4;
  return (options.examples + 2 * options.threads) * example;
}

}  // namespace headroom::inline v0::training
