#pragma once

#include "headroom/core/attention/score_terms.hpp"

/// Functions of one's own as score terms.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// A tile as functions of one's own see it.
template <class Scalar, Index Capacity, bool QueriesInLanes>
OwnTile<Scalar> own_tile(const TileScores<Scalar, Capacity, QueriesInLanes>& tile, Index first_batch) {
  return {tile.data,       tile.rows(),      tile.width, first_batch + tile.head.b, tile.head.h, tile.run.queries.begin,
          tile.keys.begin, tile.run.position};
}

/// s becomes f(factor·s), f a score function of one's own.
template <class Scalar>
struct OwnScores {
  const ScoreFunctionRef& f;
  Index first_batch;

  explicit operator bool() const { return static_cast<bool>(f); }
  /// In the backward pass `slope` receives the derivative of f and `input`, where given, factor·s.
  template <class Tile>
  void apply(const Tile& tile, Scalar factor, Scalar* slope, Scalar* input) const {
    if constexpr (Tile::kQueriesInLanes) {
      f.forward(own_tile(tile, first_batch), factor);
    } else {
      f.backward(own_tile(tile, first_batch), factor, {slope, input});
    }
  }
  template <class Tile>
  void add_gradients(const Tile& grad, const Scalar* input, const ParamSums& sums) const {
    if (sums.score_tables != nullptr) f.add_gradients(own_tile(grad, first_batch), input, sums.score_tables);
  }
};

/// Hides the pairs that a mask function of one's own does not see. At the borders of what is seen its `block` is asked
/// for strips of tiles.
template <class Scalar>
struct OwnMask {
  static constexpr Index kStrip = 16;
  const AttentionParams& params;
  Index first_batch;

  explicit operator bool() const { return static_cast<bool>(params.mask_function); }
  bool sees_any(HeadIndex head, KeyRange queries, KeyRange keys) const {
    if (!*this) return true;
    const Seen seen = block(head, queries, keys);
    if (seen != Seen::some) return seen == Seen::all;
    const Index count = keys.end - keys.begin, N = simd::kLanes<Scalar>;
    for (Index query = queries.begin; query < queries.end; ++query) {
      const Index position = params.position(query);
      const OwnTile<Scalar> row{nullptr,    1,        (count + N - 1) / N * N, first_batch + head.b, head.h, query,
                                keys.begin, &position};
      if (params.mask_function.sees_any(row, count)) return true;
    }
    return false;
  }
  /// The run of keys of which these queries may see some, and that of queries which may see some of these keys.
  KeyRange seen_keys(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return trimmed(keys, [&](KeyRange strip) { return block(head, queries, strip); });
  }
  KeyRange seeing_queries(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return trimmed(queries, [&](KeyRange strip) { return block(head, strip, keys); });
  }
  template <class Tile>
  void hide(const Tile& tile) const {
    const KeyRange queries = tile.run.queries;
    if (block(tile.head, queries, tile.keys) == Seen::all) return;
    for (Index row = 0; row < tile.rows(); row += kStrip) {
      const KeyRange rows{row, std::min(row + kStrip, tile.rows())};
      OwnTile<Scalar> strip = own_tile(tile, first_batch);
      strip.data += row * tile.width, strip.rows = rows.end - rows.begin;
      if constexpr (Tile::kQueriesInLanes) {
        if (block(tile.head, queries, shifted(rows, tile.keys.begin)) == Seen::all) continue;
        strip.first_key += row;
      } else {
        if (block(tile.head, shifted(rows, queries.begin), tile.keys) == Seen::all) continue;
        strip.first_query += row, strip.position += row;
      }
      params.mask_function.hide<Scalar, Tile::kQueriesInLanes>(strip);
    }
  }

 private:
  static KeyRange shifted(KeyRange range, Index by) { return {range.begin + by, range.end + by}; }
  Seen block(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return params.mask_function.block(first_batch + head.b, head.h, queries, keys);
  }
  /// Without strips of which seen(strip) is none at either end.
  template <class F>
  KeyRange trimmed(KeyRange range, F&& seen) const {
    while (*this && !range.empty()) {
      const KeyRange strip{range.begin, std::min(range.begin + kStrip, range.end)};
      if (seen(strip) != Seen::none) break;
      range.begin = strip.end;
    }
    while (*this && !range.empty()) {
      const KeyRange strip{std::max(range.end - kStrip, range.begin), range.end};
      if (seen(strip) != Seen::none) break;
      range.end = strip.begin;
    }
    return range;
  }
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
