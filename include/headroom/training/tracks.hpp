#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <vector>

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

/// Samples that wait until as many were separated: what went in goes out in pieces of other lengths.
class WaitingSamples {
 public:
  /// [C,n] and [N,C,n].
  void push(Example piece) { pieces_.push_back(std::move(piece)); }

  /// The next `count` samples, which are there.
  Example take(int64_t count) {
    std::vector<torch::Tensor> mixtures, stems;
    while (count > 0) {
      Example& first = pieces_.front();
      const int64_t n = first.mixture.size(-1), taken = std::min(count, n);
      mixtures.push_back(first.mixture.narrow(-1, 0, taken));
      stems.push_back(first.stems.narrow(-1, 0, taken));
      if (taken == n) {
        pieces_.pop_front();
      } else {
        first = {first.mixture.narrow(-1, taken, n - taken), first.stems.narrow(-1, taken, n - taken)};
      }
      count -= taken;
    }
    return {torch::cat(mixtures, -1), torch::cat(stems, -1)};
  }

 private:
  std::deque<Example> pieces_;
};

}  // namespace headroom::inline v0::training
