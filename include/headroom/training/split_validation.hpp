#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "headroom/models/separator.hpp"
#include "headroom/training/dataset.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/split.hpp"
#include "headroom/training/tracks.hpp"
#include "headroom/training/validation.hpp"

namespace headroom::inline v0::training {

/// The whole tracks of a split, which has to outlive them.
inline Tracks tracks_of(const Split& split) {
  const Dataset& dataset = split.dataset;
  Tracks tracks;
  std::vector<int64_t> places;  // in the data set, of those that are not just one stem
  for (int64_t place = 0; place < dataset.size(); ++place) {
    const Track& track = dataset.tracks()[static_cast<std::size_t>(place)];
    if (!track.whole) continue;
    tracks.frames.push_back(track.frames);
    places.push_back(place);
  }
  tracks.read = [&dataset, places](int64_t track, int64_t first, int64_t count) {
    return dataset.piece(places[static_cast<std::size_t>(track)], first, count);
  };
  return tracks;
}

/// Scores a model on a validation split as `training.validation` says, see validation.hpp.
inline Validation validate(const models::Separator& model, const Split& split, const Config& config) {
  return config.training.validation == "tracks" ? validate_tracks(model, tracks_of(split), config)
                                                : validate_segments(model, std::cref(split), config);
}

}  // namespace headroom::inline v0::training
