#pragma once

#include "headroom/core/attention/backward_preprocess.hpp"
#include "headroom/core/attention/bfloat16_backward.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// What the strips of one head share.
template <class Scalar>
struct BackwardHead {
  HeadIndex index;
  const KeyRange* seen;   // [passes][blocks of queries]: no key outside is seen by any query of the block
  Scalar* delta;          // [Lq], written by the first strip
  std::uint16_t* grad_q;  // [Lq][D]: lower halves of the sums where grad_q is stored in 16 bits, else null
  Turn<int>* turns;       // [blocks of queries]: of strips; null when strips run in order
  Normalisers<Scalar>* normalisers;
  ParamSums sums;  // this worker's
};

/// A worker of the backward pass: takes a strip of keys against all queries, one block of queries at a time. Keys fill
/// the lanes. With P = weights, dP = grad_output·vᵀ and delta = sum(grad_output·output):
///   dS = P·(dP - delta),  grad_v = Pᵀ·grad_output,  grad_k = scale·dSᵀ·q,  grad_q = scale·dS·k.
///
/// Several strips add to the same rows of grad_q. They take turns, block by block and in ascending order, so that the
/// sums are the same bits for any number of workers and nobody needs an accumulator of his own.
template <class Scalar>
class BackwardWorker {
  using Packet = simd::Packet<Scalar>;
  using Tile = BackwardTile<Scalar>;
  using Run = QueryRun<Scalar, kBlockSize>;
  using Scores = TileScores<Scalar, kBlockSize, false>;
  using HeadState = BackwardHead<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

 public:
  BackwardWorker(std::byte* workspace, const BackwardProblem& x, const ScoreFunction<Scalar>& score)
      : x_(x), score_(score), strips_(strips(x)), memory_(workspace, x.features, x.v.dim(), score.params()) {}

  static Index workspace_bytes(Index dim, Index value_dim, const AttentionParams& params) {
    return BackwardMemory<Scalar>::bytes(dim, value_dim, params);
  }
  static Strips<Scalar> strips(const BackwardProblem& x) {
    return {x.k.length(), x.batch() * x.heads(), x.features + x.v.dim()};
  }
  /// One even without keys: it clears grad_q.
  static Index strip_count(const BackwardProblem& x) { return std::max<Index>(strips(x).count(), 1); }

  /// Fetches a head while the one before is computed.
  void read_ahead(HeadIndex next) { ahead_.begin(x_, next); }
  /// Strip `strip` of the keys that the heads of a family use; `state(HeadIndex)` gives their BackwardHead.
  template <class StateOf>
  void run(const HeadFamily& family, Index strip, StateOf&& state) {
    const Index share = x_.heads() / x_.k.shape[1];  // heads of q that use one head of k
    const Index key_batches = x_.k.shape[0] == 1 && x_.batch() > 1 ? family.batches : 1;
    for (Index b = 0; b < family.batches; b += key_batches) {
      for (Index h = 0; h < family.heads; h += share) {
        const HeadFamily sharers{family.first_batch + b, key_batches, family.first_head + h, share};
        const Head<Scalar> of_keys{x_, score_, sharers.first(), ahead_};
        if constexpr (kMayUseBfloat16<Scalar>) {
          if (uses_bfloat16(x_, score_.params())) {
            const AmxTiles amx;
            Bfloat16Backward products(memory_, of_keys);
            run_shared_keys(products, of_keys, sharers, strip, state);
            continue;
          }
        }
        FloatBackward<Scalar> products(memory_, of_keys);
        run_shared_keys(products, of_keys, sharers, strip, state);
      }
    }
  }

 private:
  /// Heads of q that use the same head of k.
  template <class Products, class StateOf>
  void run_shared_keys(Products& products, const Head<Scalar>& of_keys, const HeadFamily& sharers, Index strip,
                       StateOf&& state) {
    KeyRange seen{x_.k.length(), 0};
    sharers.for_each([&](HeadIndex head) {
      const KeyRange* const of_block = state(head).seen;
      for (Index i = 0; i < score_.mask().passes() * blocks_in(x_.q.length()); ++i) seen = hull(seen, of_block[i]);
    });
    const Index tiles = strips_.tiles(strip);
    for (Index t = 0; t < tiles; ++t) {
      const auto lanes = strips_.tile(strip, t);
      Tile& tile = memory_.tiles[t];
      tile.keys = strips_.positions(lanes), tile.vectors = lanes.vectors;
      // Keys that nobody sees are not read: whatever they hold, NaN included, stays out of every product.
      products.load_tile(tile, tile.keys & seen);
    }
    sharers.for_each([&](HeadIndex head) { add_head(products, state(head), strip); });
    const RowWriter<Scalar> grad_k(of_keys.of(x_.grad_k), of_keys.key_positions(),
                                   state(sharers.first()).sums.polar_phase),
        grad_v(of_keys.of(x_.grad_v));
    for (Index t = 0; t < tiles; ++t) {
      store_lanes(grad_k, memory_.tiles[t], memory_.tiles[t].grad_key, score_.scale());
      store_lanes(grad_v, memory_.tiles[t], memory_.tiles[t].grad_value, 1);
    }
  }
  void store_lanes(const RowWriter<Scalar>& to, const Tile& tile, Scalar* lanes, double factor) {
    alignas(64) Scalar factors[LaneTiling<Scalar>::kWidth];
    std::fill_n(factors, LaneTiling<Scalar>::kWidth, static_cast<Scalar>(factor));
    to.unpack(tile.keys, {lanes, tile.width()}, factors, memory_.scores.buffer);
  }

  /// All queries of one head against the tiles that are loaded.
  template <class Products>
  void add_head(Products& products, const HeadState& state, Index strip) {
    const Head<Scalar> head{x_, score_, state.index, ahead_};
    products.use_head(head, head.of(x_.grad_output));
    const RowSums<Scalar> grad_q(head.of(x_.grad_q), head.query_positions(), state.grad_q);
    const KeyRange keys = strips_.positions(strip);
    const bool at_once = strip_count(x_) == 1 && score_.mask().passes() == 1;  // grad_q gets no more than one sum
    for (Index block = 0; block < blocks_in(x_.q.length()); ++block) {
      const KeyRange queries = block_at(block, x_.q.length());
      const Index rows = queries.end - queries.begin;
      if (state.turns != nullptr) state.turns[block].wait_for(static_cast<int>(strip));
      softmax_.find_apart(x_.lse, state.index, queries);
      if (strip == 0) {
        if (!at_once) grad_q.clear(queries.begin, rows);
        preprocess(products, head, state, queries);
      }
      for (int pass = 0; pass < score_.mask().passes(); ++pass) {
        const bool seen = !(state.seen[pass * blocks_in(x_.q.length()) + block] & keys).empty() &&
                          (!score_.hides_elements() || score_.sees_any(state.index, queries, keys));
        if (!seen) {
          if (at_once) grad_q.clear(queries.begin, rows);
          continue;
        }
        add_block(products, state, run_of(pass, state.index, queries), strip);
        Scalar* const sums = memory_.grad_queries.template as<Scalar>();
        if (at_once) {
          grad_q.put(queries.begin, rows, sums, memory_.vector_dim);
        } else {
          grad_q.add(queries.begin, rows, sums, memory_.vector_dim);
        }
      }
      if (strip + 1 == strip_count(x_) && !at_once) grad_q.finish(queries.begin, rows, memory_.scores.buffer);
      if (state.turns != nullptr) state.turns[block].end(static_cast<int>(strip));
    }
  }

  /// Delta, normalisers and the gradient of the sink for a block of queries.
  template <class Products>
  void preprocess(Products& products, const Head<Scalar>& head, const HeadState& state, KeyRange queries) {
    const auto [b, h] = state.index;
    write_delta(state.delta + queries.begin, RowReader<Scalar>(head.of(x_.grad_output)),
                RowReader<Scalar>(head.of(x_.output)), queries, memory_.scores.buffer);
    Scalar sink_weight[kBlockSize];  // where there are normalisers
    if (softmax_.any_apart()) normalise(products, state, queries, sink_weight);
    for (Index i = queries.begin; i < queries.end; ++i) {
      Scalar& delta = state.delta[i];
      if (x_.grad_lse.data != nullptr) delta -= static_cast<Scalar>(x_.grad_lse(b, h, i, 0));
      if (state.sums.sink == nullptr) continue;
      const Index place = i - queries.begin;
      const double weight = softmax_.apart(place)
                                ? static_cast<double>(sink_weight[place])
                                : std::exp2(*score_.sink().base2(h) - x_.lse(b, h, i, 0) * std::numbers::log2e);
      *state.sums.sink -= weight * static_cast<double>(delta);
    }
  }

  /// Writes the normalisers of a block of queries: goes over all keys, with the scores of the products.
  template <class Products>
  void normalise(Products& products, const HeadState& state, KeyRange queries, Scalar* sink_weight) {
    const Index rows = queries.end - queries.begin, h = state.index.h;
    NormaliserSum<Scalar> sums[kBlockSize];
    products.load_queries(queries);
    for (int pass = 0; pass < score_.mask().passes(); ++pass) {
      add_normalisers(products, run_of(pass, state.index, queries), state.index, sums);
    }
    state.normalisers->allocate(x_.q.length());
    for (Index i = 0; i < rows; ++i) {
      const auto [maximum, sum] = sums[i];
      const double of_sink = score_.sink() ? std::exp2(score_.sink_above(h, static_cast<double>(maximum))) : 0;
      const bool none = is_zero(sum);
      state.normalisers->maximum()[queries.begin + i] = maximum;
      state.normalisers->inverse()[queries.begin + i] = none ? Scalar(0) : static_cast<Scalar>(1 / (sum + of_sink));
      sink_weight[i] = none ? Scalar(1) : static_cast<Scalar>(1 / (1 + sum / of_sink));
    }
  }

  /// The keys that a block of queries sees in a pass.
  template <class Products>
  void add_normalisers(Products& products, const Run& run, HeadIndex head, NormaliserSum<Scalar>* sums) {
    Scalar* const scores = memory_.weights.template as<Scalar>();
    const LaneTiling<Scalar> tiling(x_.k.length());
    for (Index t = 0; t < tiling.tiles; ++t) {
      Tile tile;
      tile.keys = strips_.positions(tiling[t]), tile.vectors = tiling[t].vectors;
      const KeyRange read = tile.keys & run.any;
      if (read.empty()) continue;
      products.load_key_lanes(memory_.grad_queries, tile, read);  // it holds no sums yet
      with_count<kTileVectors>(tile.vectors, [&]<int Vectors>() {
        score<Vectors>(products, memory_.grad_queries, {scores, tile.width(), head, tile.keys, run}, 0);
        for (Index i = 0; i < run.count(); ++i) {
          sums[i].template add<Vectors>(scores + i * tile.width(), score_.factor());
        }
      });
    }
  }

  /// A block of queries in a pass against the tiles that are loaded; sums for grad_q are left in memory_.grad_queries.
  template <class Products>
  void add_block(Products& products, const HeadState& state, const Run& run, Index strip) {
    const KeyRange queries = run.queries;
    const Index rows = run.count();
    softmax_.split(x_.lse, state.index, queries, static_cast<double>(score_.factor()));
    products.load_block(queries, hides(run, strips_.positions(strip)));
    std::fill_n(memory_.grad_queries.template as<Scalar>(), padded(rows, kVnniRows) * memory_.vector_dim, Scalar(0));
    for (Index t = 0; t < strips_.tiles(strip); ++t) {
      const Tile& tile = memory_.tiles[t];
      if (!run.touches(tile.keys)) continue;
      const KeyRange seeing = score_.seeing_queries(state.index, run.that_see(tile.keys), tile.keys);
      if (seeing.empty()) continue;
      if (Products::kWholeBlocks || seeing == queries) {
        add_tile(products, tile, state, {nullptr, tile.width(), state.index, tile.keys, run});
      } else {
        part_ = run.part(seeing);
        add_tile(products, tile, state, {nullptr, tile.width(), state.index, tile.keys, part_});
      }
    }
    products.finish_grad_queries(rows);
  }

  /// Some queries of a block against one tile; `place` says which.
  template <class Products>
  void add_tile(Products& products, const Tile& tile, const HeadState& state, Scores place) {
    const KeyRange queries = place.run.queries;
    const BlockPart part{queries.begin % kBlockSize, place.run.count()};
    Scores weights = place, grad_scores = place;
    weights.data = memory_.weights.template as<Scalar>(), grad_scores.data = memory_.grad_scores.template as<Scalar>();
    with_count<kTileVectors>(tile.vectors,
                             [&]<int Vectors>() { differentiate<Vectors>(products, tile, state, weights); });
    score_.differentiate(grad_scores, state.sums, memory_.scores);
    if (products.spoiled()) add_not_finite(products, tile, part);
    with_count<kTileVectors>(tile.vectors, [&]<int Vectors>() { products.template accumulate<Vectors>(tile, part); });
  }

  Run run_of(int pass, HeadIndex head, KeyRange queries) const {
    return {score_.mask().pass(pass), score_.params(), head, queries, x_.k.length()};
  }
  bool hides(const Run& run, KeyRange keys) const { return score_.hides_elements() || !run.covers(keys); }

  /// Scores of queries of a block and a tile of keys, the same bits wherever they are computed.
  template <int Vectors, class Products>
  EIGEN_DONT_INLINE void score(const Products& products, const Piece& key_lanes, const Scores& tile, Index skip) {
    products.template scores<Vectors>(tile.data, key_lanes, {skip, tile.rows()});
    if (score_.in_every_tile() || hides(tile.run, tile.keys_in_memory())) {
      score_.apply(tile, memory_.scores);
    }
  }

  /// Weights P, and gradients of the scores dS = P·(dP - delta) in memory_.grad_scores.
  template <int Vectors, class Products>
  EIGEN_DONT_INLINE void differentiate(const Products& products, const Tile& tile, const HeadState& state,
                                       const Scores& scores) {
    constexpr Index width = Vectors * N;
    const Index first = scores.run.queries.begin, skip = first % kBlockSize, rows = scores.rows();
    const Scalar* const delta = state.delta + first;
    Scalar *const weights = scores.data, *const grad_scores = memory_.grad_scores.template as<Scalar>();
    score<Vectors>(products, tile.key, scores, skip);
    softmax_.part(skip, first, *state.normalisers)
        .template weights<Vectors>(weights, rows, simd::broadcast(score_.factor()));
    const bool drops = static_cast<bool>(score_.dropout());
    products.template grad_weights<Vectors>(
        tile, {skip, rows}, [&](Index row, int v, Packet dp) __attribute__((always_inline)) {
          const Packet p = simd::load(weights + row * width + v * N);
          return drops ? dp : simd::pmul(p, simd::psub(dp, simd::broadcast(delta[row])));
        });
    if (drops) {
      score_.dropout().derivative(scores, grad_scores, delta);
    } else if (hides(scores.run, scores.keys_in_memory())) {
      for (Index i = 0; i < rows * width; i += N) {
        simd::store(grad_scores + i, unless_zero(simd::load(weights + i), simd::load(grad_scores + i)));
      }
    }
  }

  /// What products leave out of the sums over queries, for the keys that those queries see.
  template <class Products>
  void add_not_finite(const Products& products, const Tile& tile, BlockPart part) const {
    const auto add = [&](Scalar* to, const Scalar* s, Index cols, auto&& element) {
      for (Index i = 0; i < part.rows; ++i) {
        for (Index d = 0; d < cols; ++d) {
          const Scalar x = element(part.skip + i, d);
          for (Index l = 0; l < tile.width() && !is_finite(x); ++l) {
            const Scalar factor = s[i * tile.width() + l];
            if (!is_zero(factor)) to[d * tile.width() + l] += factor * x;
          }
        }
      }
    };
    add(tile.grad_key, memory_.grad_scores.template as<Scalar>(), memory_.dim,
        [&](Index i, Index d) { return products.query(i, d); });
    add(tile.grad_value, memory_.weights.template as<Scalar>(), memory_.value_dim,
        [&](Index i, Index d) { return products.grad(i, d); });
  }

  const BackwardProblem& x_;
  const ScoreFunction<Scalar>& score_;
  Strips<Scalar> strips_;
  BackwardMemory<Scalar> memory_;
  BlockSoftmax<Scalar> softmax_;
  ReadAhead ahead_;
  Run part_;  // of a block's queries, where some see no key of a tile
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
