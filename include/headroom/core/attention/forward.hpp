#pragma once

#include "headroom/core/attention/bfloat16_forward.hpp"
#include "headroom/core/attention/pass.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// What becomes of the scores of a tile while they are still in registers: those outside of the ranges are hidden, and
/// the maximum rises.
template <class Scalar, int Vectors>
struct ScoreFinish {
  const typename ForwardTile<Scalar>::Scores& scores;
  SoftmaxBlock<Scalar, Vectors>& softmax;

  template <bool Borders>
  EIGEN_ALWAYS_INLINE simd::Packet<Scalar> operator()(Index key, int v, simd::Packet<Scalar> s) const {
    if constexpr (Borders) s = scores.run.hide_outside(scores.keys.begin + key, v * simd::kLanes<Scalar>, s);
    softmax.raise(v, s);
    return s;
  }
};

/// A worker of the forward pass: takes a strip of queries over all keys, one block of keys at a time (FlashAttention,
/// Dao et al. 2022).
template <class Scalar>
class ForwardWorker {
  using Tile = ForwardTile<Scalar>;
  using Scores = typename Tile::Scores;
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;

 public:
  ForwardWorker(std::byte* workspace, Index dim, Index value_dim)
      : scratch_(workspace),
        scores_(scratch_.take<Scalar>(kBlockSize * kWidth)),
        float_memory_(scratch_, dim, value_dim) {
    if constexpr (kMayUseBfloat16<Scalar>) bfloat16_memory_.emplace(scratch_, dim, value_dim);
    for (Index t = 0; t < Strips<Scalar>::most_tiles(dim + value_dim); ++t) {
      Tile& tile = tiles_[t];
      tile.query = scratch_.take_piece<Scalar>(padded_dim<Scalar>(dim) * kWidth);
      tile.output = scratch_.take<Scalar>(padded_dim<Scalar>(value_dim) * kWidth);
      tile.softmax = {scratch_.take<Scalar>(kWidth), scratch_.take<Scalar>(kWidth)};
    }
  }
  static Index workspace_bytes(Index dim, Index value_dim) {
    return ForwardWorker(nullptr, dim, value_dim).scratch_.bytes();
  }

  /// Fetches a head while the one before is computed.
  void read_ahead(const ForwardProblem& x, HeadIndex next) { ahead_.begin(x, next); }
  /// Computes the rows of one head that a strip holds.
  void run(const ForwardProblem& x, const ScoreFunction<Scalar>& score, HeadIndex index, const Strips<Scalar>& strips,
           Index strip) {
    const Head<Scalar> head{x, score, index, ahead_};
    FloatForward<Scalar> in_float(float_memory_, head);
    if constexpr (kMayUseBfloat16<Scalar>) {
      if (uses_bfloat16(head.x, head.score.params())) {
        const AmxTiles amx;
        Bfloat16Forward products(*bfloat16_memory_, in_float, head);
        return run(products, head, strips, strip);
      }
    }
    run(in_float, head, strips, strip);
  }

 private:
  template <class Products>
  void run(Products& products, const Head<Scalar>& head, const Strips<Scalar>& strips, Index strip) {
    const Index tiles = strips.tiles(strip);
    for (Index t = 0; t < tiles; ++t) {
      const auto lanes = strips.tile(strip, t);
      begin(products, tiles_[t], lanes.vectors, strips.positions(lanes));
    }
    for (int pass = 0; pass < head.score.mask().passes(); ++pass) {
      const MaskRef mask = head.score.mask().pass(pass);
      KeyRange needed{head.x.k.length(), 0};
      for (Index t = 0; t < tiles; ++t) {
        const KeyRange queries = strips.positions(strips.tile(strip, t));
        tiles_[t].run = {mask, head.score.params(), head.index, queries, head.x.k.length()};
        needed = hull(needed, head.score.seen_keys(head.index, queries, tiles_[t].run.any));
      }
      for (Index key = needed.begin; key < needed.end; key += kBlockSize) {
        add_block(products, head, {key, std::min(key + kBlockSize, needed.end)}, tiles);
      }
    }
    for (Index t = 0; t < tiles; ++t) finish(tiles_[t], head);
  }

  template <class Products>
  void begin(Products& products, Tile& tile, int vectors, KeyRange queries) {
    tile.vectors = vectors;
    products.load_queries(tile, queries);
    std::fill_n(tile.output, products.output_rows() * tile.width(), Scalar(0));
    tile.softmax.begin(tile.width());
  }

  /// Adds a block of keys to those tiles that see any of it.
  template <class Products>
  void add_block(Products& products, const Head<Scalar>& head, KeyRange block, Index tiles) {
    const ScoreFunction<Scalar>& score = head.score;
    bool loaded = false;
    for (Index t = 0; t < tiles; ++t) {
      const Tile& tile = tiles_[t];
      const KeyRange part = score.seen_keys(head.index, tile.run.queries, tile.run.any & block);
      if (part.empty()) continue;
      if (score.hides_elements() && !score.sees_any(head.index, tile.run.queries, part)) continue;
      if (!loaded) products.load_keys(block);  // the first tile that needs them
      loaded = true;
      const Scores scores{scores_, tile.width(), head.index, part, tile.run};
      with_count<kTileVectors>(tile.vectors, [&]<int Vectors>() {
        products.template with_head_dim<Vectors>(
            [&]<int HeadDim>() { attend<Products, Vectors, HeadDim>(products, tile, scores, score); });
      });
    }
  }

  /// Adds a block of keys to a tile: scores, weights relative to the running maximum, weighted sum of values.
  template <class Products, int Vectors, int HeadDim>
  EIGEN_DONT_INLINE void attend(Products& products, const Tile& tile, const Scores& scores,
                                const ScoreFunction<Scalar>& score) {
    const bool by_tile = score.in_every_tile();
    SoftmaxBlock<Scalar, Vectors> softmax(tile.softmax, score.factor());
    const ScoreFinish<Scalar, Vectors> finish{scores, softmax};
    const KeyRange inside = by_tile ? KeyRange{0, scores.key_count()} : tile.run.inside(scores.keys);
    products.template scores<Vectors, HeadDim>(tile, scores, inside, finish);
    if (by_tile) [[unlikely]] {
      score.apply(scores, ScoreMemory<Scalar>(float_memory_.buffer));
      softmax.raise_anew(scores.data, scores.key_count());
    }
    softmax.fix_maximum(tile.softmax);
    const bool drops = static_cast<bool>(score.dropout());
    products.template weights<Vectors>(softmax, scores, /*final=*/!drops);
    softmax.end(tile.softmax);
    if (drops) score.dropout().apply(scores);
    simd::Packet<Scalar> decay[Vectors];  // a copy: its address leaves this function, the softmax stays in registers
    std::copy_n(softmax.decay, Vectors, decay);
    products.template add_values<Vectors, HeadDim>(tile, scores, decay);
  }

  /// Divides by the sum of weights; writes the rows and their log-sum-exp.
  void finish(const Tile& tile, const Head<Scalar>& head) {
    const KeyRange queries = tile.run.queries;
    const auto [b, h] = head.index;
    const FinishedSoftmax<Scalar> softmax(tile.softmax, tile.width(), head.score, h);
    for (Index i = queries.begin; i < queries.end && head.x.lse.data != nullptr; ++i) {
      head.x.lse(b, h, i, 0) = softmax.lse[i - queries.begin];
    }
    RowWriter<Scalar>(head.of(head.x.output))
        .unpack(queries, {tile.output, tile.width()}, softmax.inverse, float_memory_.buffer);
  }

  Scratch scratch_;
  Scalar* scores_;  // [keys][width], then the weights
  typename FloatForward<Scalar>::Memory float_memory_;
  std::optional<Bfloat16Forward::Memory> bfloat16_memory_;
  Tile tiles_[Strips<Scalar>::kMostTiles];
  ReadAhead ahead_;
};

/// The forward pass of all heads: one task for each strip of queries, or for a run of short heads.
template <class Scalar>
class ForwardPass final : public Pass {
  using Worker = ForwardWorker<Scalar>;

 public:
  ForwardPass(const ForwardProblem& x, const AttentionParams& params, const MaskRef& mask, Index workers)
      : x_(x),
        score_(params, mask, x),
        strips_(x.q.length(), x.batch() * x.heads(), x.features + x.v.dim()),
        workers_(workers),
        heads_a_task_(strips_.count() == 1 && ReadAhead::serves(x) ? heads_in_run(heads(), workers) : 1),
        worker_bytes_(Worker::workspace_bytes(x.features, x.v.dim())) {}

  Index workspace_bytes() const override { return worker_bytes_ * workers_; }
  void use(std::byte* workspace) override { workspace_ = workspace; }
  Index preparations() const override { return 0; }
  void prepare(Index) override {}
  Index tasks() const override { return (heads() + heads_a_task_ - 1) / heads_a_task_ * strips_.count(); }
  void run(Index task, int worker) override {
    const Index first = task / strips_.count() * heads_a_task_, end = std::min(first + heads_a_task_, heads());
    const Index strip = strips_.count() - 1 - task % strips_.count();  // under a causal mask the longest first
    Worker strip_worker(workspace_ + worker * worker_bytes_, x_.features, x_.v.dim());
    for (Index head = first; head < end; ++head) {
      if (head + 1 < end) strip_worker.read_ahead(x_, index_of(head + 1));
      strip_worker.run(x_, score_, index_of(head), strips_, strip);
    }
  }

 private:
  Index heads() const { return x_.batch() * x_.heads(); }
  HeadIndex index_of(Index head) const { return {head / x_.heads(), head % x_.heads()}; }

  const ForwardProblem& x_;
  ScoreFunction<Scalar> score_;
  Strips<Scalar> strips_;
  Index workers_, heads_a_task_, worker_bytes_;
  std::byte* workspace_ = nullptr;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
