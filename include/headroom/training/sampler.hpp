#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "headroom/training/random.hpp"
#include "headroom/training/track_list.hpp"

namespace headroom::inline v0::training {

/// Where a segment begins.
struct Position {
  std::size_t track = 0;  ///< its number in the list
  std::int64_t frame = 0;
};

/// Draws segments of some of the tracks of a list.
class Sampler {
 public:
  /// What all samplers of a data set have in common.
  struct Rules {
    std::int64_t segment_length = 1;
    bool by_length = false;            ///< every segment equally often; else every track
    std::vector<double> weights = {};  ///< how often each root is drawn from; empty: roots do not matter
  };

  /// Of the tracks that `suits` says yes to. A root without any is never drawn from.
  Sampler(const std::vector<Track>& tracks, const Rules& rules, const std::function<bool(const Track&)>& suits)
      : by_length_(rules.by_length) {
    std::vector<Pool> pools(std::max<std::size_t>(rules.weights.size(), 1));
    for (std::size_t i = 0; i < tracks.size(); ++i) {
      if (!suits(tracks[i])) continue;
      Pool& pool = pools[rules.weights.empty() ? 0 : tracks[i].root];
      const std::int64_t before = pool.ends.empty() ? 0 : pool.ends.back();
      pool.tracks.push_back(i);
      pool.ends.push_back(before + tracks[i].frames - rules.segment_length + 1);
    }
    for (std::size_t root = 0; root < pools.size(); ++root) {
      if (pools[root].tracks.empty()) continue;
      total_weight_ += rules.weights.empty() ? 1 : rules.weights[root];
      weight_ends_.push_back(total_weight_);
      pools_.push_back(std::move(pools[root]));
    }
  }

  bool empty() const { return pools_.empty(); }

  /// From a sampler that is not empty.
  Position draw(SplitMix64& random) const {
    const Pool& pool = pools_.size() == 1 ? pools_.front() : pools_[draw_root(random)];
    std::size_t i = 0;
    if (!by_length_) {
      i = static_cast<std::size_t>(random.below(static_cast<std::int64_t>(pool.tracks.size())));
      return {pool.tracks[i], random.below(pool.positions(i))};
    }
    const std::int64_t position = random.below(pool.ends.back());
    i = static_cast<std::size_t>(std::ranges::upper_bound(pool.ends, position) - pool.ends.begin());
    return {pool.tracks[i], position - (pool.ends[i] - pool.positions(i))};
  }

 private:
  /// Tracks, and where the positions of each end in the sequence of all that a segment can have.
  struct Pool {
    std::vector<std::size_t> tracks;
    std::vector<std::int64_t> ends;

    std::int64_t positions(std::size_t i) const { return ends[i] - (i == 0 ? 0 : ends[i - 1]); }
  };

  std::size_t draw_root(SplitMix64& random) const {
    const auto end = std::ranges::upper_bound(weight_ends_, random.uniform() * total_weight_);
    return std::min(pools_.size() - 1, static_cast<std::size_t>(end - weight_ends_.begin()));
  }

  bool by_length_;
  std::vector<Pool> pools_;
  std::vector<double> weight_ends_;
  double total_weight_ = 0;
};

}  // namespace headroom::inline v0::training
