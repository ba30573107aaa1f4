#pragma once

#include <atomic>
#include <thread>

#include "headroom/core/attention/problem.hpp"
#include "headroom/core/lanes.hpp"
#include "headroom/core/mask.hpp"

/// How the work of a pass is divided, and in which order results are added up. Strips, blocks and the order of sums
/// depend on the shape alone, never on the number of workers, because the bits of sums depend on them.
///
/// A tile is a run of positions in vector lanes (lanes.hpp). A strip is a run of tiles that one task has loaded at the
/// same time, so that they share what it reads of the other side. A block is a run of positions of that other side.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Positions in a block: its scores with a tile stay in the L1 cache.
inline constexpr Index kBlockSize = Index{16} * kTileRows;

inline Index blocks_in(Index length) { return (length + kBlockSize - 1) / kBlockSize; }
inline KeyRange block_at(Index block, Index length) {
  return {block * kBlockSize, std::min((block + 1) * kBlockSize, length)};
}

/// The strips of a sequence.
template <class Scalar>
class Strips {
 public:
  /// Tiles in a strip of 192 floats.
  static constexpr Index kMostTiles = 768 / (LaneTiling<Scalar>::kWidth * sizeof(Scalar));
  static constexpr Index kMostLanes = kMostTiles * LaneTiling<Scalar>::kWidth;
  /// Tiles whose operands of `dims` features altogether (D + Dv) fit into the workspace.
  static Index most_tiles(Index dims) { return dims <= 256 ? kMostTiles : (kMostTiles + 1) / 2; }

  /// Few heads have smaller strips, for several workers to share.
  Strips(Index length, Index heads, Index dims) : length_(length), tiling_(length) {
    const Index limit = heads >= 16 ? most_tiles(dims) : std::clamp<Index>(tiling_.tiles / 8, 1, most_tiles(dims));
    count_ = (tiling_.tiles + limit - 1) / limit;
    size_ = count_ == 0 ? 0 : (tiling_.tiles + count_ - 1) / count_;
  }
  Index count() const { return count_; }
  Index tiles(Index strip) const { return std::clamp<Index>(tiling_.tiles - strip * size_, 0, size_); }
  /// Tile `t` of a strip.
  typename LaneTiling<Scalar>::Tile tile(Index strip, Index t) const { return tiling_[strip * size_ + t]; }
  /// The positions of a tile, and of a strip.
  KeyRange positions(const typename LaneTiling<Scalar>::Tile& tile) const {
    return {tile.begin, std::min(tile.begin + tile.width(), length_)};
  }
  KeyRange positions(Index strip) const {
    const Index count = tiles(strip);
    if (count == 0) return {};
    return {tile(strip, 0).begin, positions(tile(strip, count - 1)).end};
  }

 private:
  Index length_;
  LaneTiling<Scalar> tiling_;
  Index size_, count_;
};

/// Short heads that one task takes one after the other, so that each can be fetched while the one before is computed.
inline Index heads_in_run(Index heads, Index workers) { return std::clamp<Index>(heads / (8 * workers), 1, 16); }

/// Lets tasks through one after the other: task i waits for turn i.
template <class Count>
class Turn {
 public:
  void wait_for(Count turn) const {
    while (next_.load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }
  void end(Count turn) { next_.store(turn + 1, std::memory_order_release); }

 private:
  std::atomic<Count> next_{0};
};

/// Heads of q that one task of the backward pass has to see together, because they share keys or add to the same
/// gradient of a bias.
struct HeadFamily {
  Index first_batch, batches, first_head, heads;

  Index size() const { return batches * heads; }
  /// Place of a head in the family.
  Index member(HeadIndex head) const { return (head.b - first_batch) * heads + head.h - first_head; }
  HeadIndex first() const { return {first_batch, first_head}; }
  /// Calls f(HeadIndex) for each, in order.
  template <class F>
  void for_each(F&& f) const {
    for (Index b = first_batch; b < first_batch + batches; ++b) {
      for (Index h = first_head; h < first_head + heads; ++h) f(HeadIndex{b, h});
    }
  }
};

/// The families of a backward pass.
class HeadFamilies {
 public:
  explicit HeadFamilies(const BackwardProblem& x) : heads_(x.heads()) {
    const StoredTensor& bias = x.param_grads.bias;
    const bool by_tiles = x.param_grads.bias_by_tiles();
    const bool one_batch = x.k.shape[0] == 1 || (by_tiles && bias.strides[0] == 0);
    const bool one_head = by_tiles && bias.strides[1] == 0;
    family_batches_ = one_batch ? x.batch() : 1;
    family_heads_ = one_head ? heads_ : heads_ / std::max<Index>(x.k.shape[1], 1);
    const Index all = x.batch() * heads_;
    count_ = all == 0 ? 0 : all / members();
  }
  Index count() const { return count_; }
  Index members() const { return family_batches_ * family_heads_; }
  Index batches() const { return family_batches_; }
  Index heads() const { return family_heads_; }

  HeadFamily operator[](Index index) const {
    const Index per_batch = heads_ / family_heads_;
    return {index / per_batch * family_batches_, family_batches_, index % per_batch * family_heads_, family_heads_};
  }

 private:
  Index heads_, family_batches_, family_heads_, count_;
};

/// Tasks of a backward pass: whole families go to one worker each for as long as every worker gets one, in runs; the
/// strips of keys of the last few are tasks of their own.
struct BackwardTasks {
  Index run, whole_families, whole, split, strips;

  BackwardTasks(Index families, Index families_in_run, Index strips_of_keys, Index workers)
      : run(families_in_run),
        whole_families(families / workers * workers),
        whole((whole_families + run - 1) / run),
        split(families - whole_families),
        strips(strips_of_keys) {}

  Index count() const { return whole + split * strips; }
  bool is_whole(Index task) const { return task < whole; }
  /// Of a run of whole ones the first and one past the last.
  Index family(Index task) const { return is_whole(task) ? task * run : whole_families + (task - whole) % split; }
  Index end_of_run(Index task) const { return std::min((task + 1) * run, whole_families); }
  Index strip(Index task) const { return (task - whole) / split; }
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
