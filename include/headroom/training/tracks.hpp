#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "headroom/training/example.hpp"

namespace headroom::inline v0::training {

/// Whole recordings with their stems, of which any piece can be read.
struct Tracks {
  std::vector<int64_t> frames;  ///< of each track: samples of a channel
  /// The samples first, …, first + count - 1 of a track: [C,n] and [N,C,n].
  std::function<Example(int64_t track, int64_t first, int64_t count)> read;
};

}  // namespace headroom::inline v0::training
