#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "headroom/audio/sample_queue.hpp"
#include "headroom/training/example.hpp"

namespace headroom::inline v0::training {

/// Whole recordings with their stems, of which any piece can be read.
struct Tracks {
  struct Track {
    std::string name;
    int64_t frames = 0;  ///< samples of a channel
  };
  std::vector<Track> tracks;
  /// The samples first, …, first + count - 1 of a track: [C,n] and [N,C,n].
  std::function<Example(int64_t track, int64_t first, int64_t count)> read;
};

/// Samples that wait until as many were separated.
class WaitingSamples {
 public:
  /// [C,n] and [N,C,n].
  void push(const Example& piece) {
    mixtures_.push(piece.mixture);
    stems_.push(piece.stems);
  }

  /// The next `count` samples, which are there.
  Example take(int64_t count) { return {mixtures_.take(count), stems_.take(count)}; }

 private:
  audio::SampleQueue mixtures_, stems_;
};

}  // namespace headroom::inline v0::training
