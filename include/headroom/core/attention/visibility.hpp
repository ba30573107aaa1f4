#pragma once

#include "headroom/core/attention/hidden_scores.hpp"
#include "headroom/core/attention/mask_ref.hpp"
#include "headroom/core/attention/problem.hpp"
#include "headroom/core/lanes.hpp"
#include "headroom/core/mask.hpp"

/// Which keys a query sees by the ranges of its mask. Single (query, key) pairs are hidden by score terms.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// The smallest range that holds all ranges [begin[i], end[i]).
template <class T>
KeyRange hull_of(const T* begin, const T* end, Index count, Index keys) {
  T first = static_cast<T>(keys), last = 0;
  for (Index i = 0; i < count; ++i) {
    const bool empty = begin[i] >= end[i];
    first = !empty && begin[i] < first ? begin[i] : first;
    last = !empty && end[i] > last ? end[i] : last;
  }
  return {static_cast<Index>(first), static_cast<Index>(last)};
}

/// A run of queries of one head: which keys each one sees in a pass over them, where it stands, and its slope.
template <class Scalar, Index Capacity>
struct QueryRun {
  alignas(64) Scalar first[Capacity];
  alignas(64) Scalar last[Capacity];  // one past the last key
  alignas(64) Scalar slope[Capacity];
  Index position[Capacity];
  KeyRange queries;
  KeyRange any;  // no key outside is seen by any query
  KeyRange all;  // every key inside is seen by every query

  QueryRun() = default;
  /// Places past the last query repeat it.
  QueryRun(const MaskRef& mask, const AttentionParams& params, HeadIndex head, KeyRange run, Index keys)
      : queries(run) {
    const Index count = run.end - run.begin;
    Index begin[Capacity], end[Capacity];
    mask.ranges(head, run, keys, begin, end);
    std::copy_n(begin, count, first);
    std::copy_n(end, count, last);
    summarise(keys);
    std::fill(first + count, first + Capacity, first[count - 1]);
    std::fill(last + count, last + Capacity, last[count - 1]);
    if (!params.slopes && !params.has_functions()) return;
    for (Index i = 0; i < Capacity; ++i) {
      const Index query = run.begin + std::min(i, count - 1);
      position[i] = params.position(query);
      if (params.slopes) slope[i] = static_cast<Scalar>(params.slopes.at(head.b, head.h, query, 0));
    }
  }
  /// From the first to the last query that sees any of `keys`.
  KeyRange that_see(KeyRange keys) const {
    const auto sees = [&](Index query) {
      const Index i = query - queries.begin;
      return !(KeyRange{static_cast<Index>(first[i]), static_cast<Index>(last[i])} & keys).empty();
    };
    KeyRange part = queries;
    while (part.begin < part.end && !sees(part.begin)) ++part.begin;
    while (part.begin < part.end && !sees(part.end - 1)) --part.end;
    return part;
  }
  /// The run of some of these queries.
  QueryRun part(KeyRange part) const {
    const Index skip = part.begin - queries.begin, count = part.end - part.begin;
    QueryRun run;
    run.queries = part;
    std::copy_n(first + skip, count, run.first);
    std::copy_n(last + skip, count, run.last);
    std::copy_n(position + skip, count, run.position);
    std::copy_n(slope + skip, count, run.slope);
    run.summarise(any.end);
    return run;
  }
  /// Places within `keys` that every query sees.
  KeyRange inside(KeyRange keys) const {
    const Index length = keys.end - keys.begin, begin = std::clamp<Index>(all.begin - keys.begin, 0, length);
    return {begin, std::clamp<Index>(all.end - keys.begin, begin, length)};
  }
  /// Scores of `key` for the queries from `place` on, hidden where a query does not see it.
  EIGEN_ALWAYS_INLINE simd::Packet<Scalar> hide_outside(Index key, Index place, simd::Packet<Scalar> scores) const {
    const auto at = simd::broadcast(static_cast<Scalar>(key));
    const auto seen =
        simd::pand(simd::pcmp_le(simd::load(first + place), at), simd::pcmp_lt(at, simd::load(last + place)));
    return simd::pselect(seen, scores, simd::broadcast(kHidden<Scalar>));
  }
  bool touches(KeyRange keys) const { return !(any & keys).empty(); }
  bool covers(KeyRange keys) const { return all.contains(keys); }
  Index count() const { return queries.end - queries.begin; }

 private:
  void summarise(Index keys) {
    any = hull_of(first, last, count(), keys);
    Scalar begin = 0, end = static_cast<Scalar>(keys);
    for (Index i = 0; i < count(); ++i) begin = std::max(begin, first[i]), end = std::min(end, last[i]);
    all = {static_cast<Index>(begin), static_cast<Index>(end)};
  }
};

/// A tile of scores [rows][width] of one head, and its place among all scores. In the forward pass queries fill the
/// lanes and rows are keys, in the backward pass it is the other way round.
template <class Scalar, Index Capacity, bool QueriesInLanes>
struct TileScores {
  static constexpr bool kQueriesInLanes = QueriesInLanes;

  Scalar* data;
  Index width;  // lanes in memory: those past the last query or key hold what nobody asks for
  HeadIndex head;
  KeyRange keys;
  const QueryRun<Scalar, Capacity>& run;

  Index key_count() const { return keys.end - keys.begin; }
  Index rows() const { return QueriesInLanes ? key_count() : run.count(); }
  Index lanes() const { return QueriesInLanes ? run.count() : key_count(); }
  Scalar* row(Index r) const { return data + r * width; }
  Index query(Index r, Index lane) const { return run.queries.begin + (QueriesInLanes ? lane : r); }
  Index key(Index r, Index lane) const { return keys.begin + (QueriesInLanes ? r : lane); }
  /// The keys of its memory: in the backward pass lanes past the last key count too.
  KeyRange keys_in_memory() const { return {keys.begin, QueriesInLanes ? keys.end : keys.begin + width}; }

  /// Hides what is outside of the ranges.
  void hide_outside() const {
    if (run.covers(keys_in_memory())) return;
    const KeyRange inside = run.inside(keys);
    for (Index r = 0; r < rows(); ++r) {
      if constexpr (QueriesInLanes) {
        if (!inside.contains(r)) hide_outside_key(r);
      } else {
        hide_outside_query(r);
      }
    }
  }

 private:
  void hide_outside_key(Index r) const {
    Scalar* const s = row(r);
    for (Index l = 0; l < width; l += simd::kLanes<Scalar>) {
      simd::store(s + l, run.hide_outside(keys.begin + r, l, simd::load(s + l)));
    }
  }
  void hide_outside_query(Index r) const {
    Scalar* const s = row(r);
    const auto lane = [&](Scalar key) { return std::clamp<Index>(static_cast<Index>(key) - keys.begin, 0, width); };
    std::fill(s, s + lane(run.first[r]), kHidden<Scalar>);
    std::fill(s + lane(run.last[r]), s + width, kHidden<Scalar>);
  }
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
