#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/reader.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/dataset.hpp"

namespace headroom::inline v0::training {

/// What the files of one stem are like. Of at most kFiles files, spread evenly over the data set, kPieces pieces of
/// kFrames frames are read, spread evenly over the file.
struct StemStatistics {
  static constexpr std::int64_t kFiles = 50, kPieces = 8, kFrames = 4096;

  std::string stem;
  std::int64_t files = 0;    ///< that there are
  std::int64_t read = 0;     ///< of which so many were looked at
  std::int64_t clipped = 0;  ///< of these, those with a sample at full scale
  double silent = 0;         ///< share of the pieces without a sample above -60 dB of full scale
};

/// What a data set is made of.
struct DatasetStatistics {
  std::int64_t tracks = 0;
  double hours = 0;
  std::vector<StemStatistics> stems;
  std::vector<std::string> unreadable = {};  ///< what is wrong with files that could not be looked at
};

namespace detail {

/// Looks at pieces of a file and adds what they are like.
inline void add_file(StemStatistics& statistics, std::int64_t& silent_pieces, const StemFile& file) {
  constexpr float kFullScale = 32767.f / 32768, kSilence = 1e-3f;
  audio::AudioReader reader(file.path, audio::WholeFile::known);
  float greatest = 0;
  std::int64_t silent = 0;
  for (std::int64_t piece = 0; piece < StemStatistics::kPieces; ++piece) {
    const std::int64_t middle = reader.frames() * (2 * piece + 1) / (2 * StemStatistics::kPieces);
    reader.seek(std::max<std::int64_t>(0, middle - StemStatistics::kFrames / 2));
    const float level = reader.read(StemStatistics::kFrames).abs().max().item<float>();
    silent += level <= kSilence;
    greatest = std::max(greatest, level);
  }
  silent_pieces += silent;
  ++statistics.read;
  statistics.clipped += greatest >= kFullScale;
}

}  // namespace detail

/// Looks at a part of the files of a data set, see StemStatistics.
inline DatasetStatistics statistics_of(const Dataset& dataset) {
  DatasetStatistics result{.tracks = dataset.size(), .stems = {}};
  for (const Track& track : dataset.tracks()) {
    result.hours += static_cast<double>(track.frames) / static_cast<double>(dataset.options().sample_rate) / 3600;
  }
  for (std::size_t k = 0; k < dataset.stems().size(); ++k) {
    std::vector<const StemFile*> files;
    for (const Track& track : dataset.tracks()) {
      if (track.has(k)) files.push_back(&*track.stems[k]);
    }
    StemStatistics of_stem{.stem = dataset.stems()[k], .files = static_cast<std::int64_t>(files.size())};
    const std::int64_t count = std::min(of_stem.files, StemStatistics::kFiles);
    std::int64_t silent_pieces = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      try {
        detail::add_file(of_stem, silent_pieces, *files[static_cast<std::size_t>(i * of_stem.files / count)]);
      } catch (const Error& error) {  // what becomes of it is decided when it is drawn
        result.unreadable.emplace_back(error.what());
      }
    }
    of_stem.silent = static_cast<double>(silent_pieces) /
                     static_cast<double>(std::max<std::int64_t>(1, of_stem.read * StemStatistics::kPieces));
    result.stems.push_back(std::move(of_stem));
  }
  return result;
}

/// What is left out of a data set, and what it is made of: lines for people.
inline std::vector<std::string> describe(const Dataset& dataset) {
  std::vector<std::string> lines = dataset.notices();
  const DatasetStatistics statistics = statistics_of(dataset);
  lines.insert(lines.end(), statistics.unreadable.begin(), statistics.unreadable.end());
  std::ostringstream text;
  text.precision(3);
  text << statistics.tracks << " tracks, " << statistics.hours << " hours";
  lines.push_back(text.str());
  for (const StemStatistics& stem : statistics.stems) {
    text.str("");
    text << stem.stem << ": " << stem.files << " files; of " << stem.read << " looked at, " << stem.clipped
         << " with samples at full scale, " << 100 * stem.silent << " % silent";
    lines.push_back(text.str());
  }
  return lines;
}

}  // namespace headroom::inline v0::training
