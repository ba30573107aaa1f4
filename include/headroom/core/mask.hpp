#pragma once

#include <algorithm>
#include <concepts>

#include "headroom/core/view.hpp"

namespace headroom::inline v0::core {

/// The keys [begin, end) that a query may attend to; empty when begin >= end.
struct KeyRange {
  Index begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  bool contains(Index key) const { return begin <= key && key < end; }
  bool contains(KeyRange keys) const { return begin <= keys.begin && keys.end <= end; }
  bool operator==(const KeyRange&) const = default;
  friend KeyRange operator&(KeyRange a, KeyRange b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }
};

namespace detail {

/// The smallest range that holds both, of which {keys, 0} is none.
inline KeyRange hull(KeyRange a, KeyRange b) { return {std::min(a.begin, b.begin), std::max(a.end, b.end)}; }

}  // namespace detail

/// A mask answers, for a query of one head, which contiguous range of keys it may see. Tiles outside every range are
/// never computed; only tiles that a range's border crosses are masked element by element.
template <class M>
concept Mask = requires(const M& mask, Index i) {
  { mask.keys(i, i, i) } -> std::convertible_to<KeyRange>;  // (batch, head, query)
};

/// A mask whose queries may see a second range, which shares no key with the first. Passes walk over one range after
/// the other, so that what lies between them costs nothing.
template <class M>
concept TwoRangeMask = Mask<M> && requires(const M& mask, Index i) {
  { mask.other_keys(i, i, i) } -> std::convertible_to<KeyRange>;  // (batch, head, query)
};

/// Every query sees every key.
struct NoMask {
  KeyRange keys(Index, Index, Index) const { return {0, Eigen::NumTraits<Index>::highest()}; }
};

/// Query i sees keys 0 … i + offset. Offset 0 aligns the triangle top left; Lk - Lq aligns it bottom right.
struct CausalMask {
  Index offset = 0;
  KeyRange keys(Index, Index, Index query) const { return {0, query + offset + 1}; }
};

/// Query i stands at position i + offset and sees keys position - left … position + right; negative: no limit.
struct WindowMask {
  Index left = -1, right = -1, offset = 0;
  KeyRange keys(Index, Index, Index query) const {
    const Index position = query + offset;
    return {left < 0 ? 0 : std::max<Index>(position - left, 0),
            right < 0 ? Eigen::NumTraits<Index>::highest() : position + right + 1};
  }
};

/// A window beside which the first tokens see everything and are seen by all (global attention: Longformer, Beltagy et
/// al. 2020): a query sees the keys of its window and keys 0 … tokens - 1, one at a position below `tokens` every key.
struct GlobalWindowMask {
  WindowMask window = {};
  Index tokens = 0;

  bool sees_all(Index query) const { return query + window.offset < tokens; }
  KeyRange keys(Index b, Index h, Index query) const {
    return sees_all(query) ? NoMask{}.keys(b, h, query)
                           : window.keys(b, h, query) & KeyRange{tokens, Eigen::NumTraits<Index>::highest()};
  }
  KeyRange other_keys(Index, Index, Index query) const { return {0, sees_all(query) ? 0 : tokens}; }
};

/// The same ranges for all batches and heads, one for each query: packed sequences, for example.
struct RangeMask {
  const Index *begin = nullptr, *end = nullptr;  // [Lq]
  KeyRange keys(Index, Index, Index query) const { return {begin[query], end[query]}; }
};

/// All queries of batch b see keys 0 … lengths[b] - 1.
template <class Integer>
struct KeyLengthMask {
  const Integer* lengths = nullptr;  // [B]
  KeyRange keys(Index batch, Index, Index) const { return {0, static_cast<Index>(lengths[batch])}; }
};

/// What both masks allow, of which one may have two ranges.
template <Mask A, Mask B>
struct BothMasks {
  static_assert(!(TwoRangeMask<A> && TwoRangeMask<B>), "BothMasks takes at most one mask with other_keys()");

  A first;
  B second;
  KeyRange keys(Index b, Index h, Index query) const { return first.keys(b, h, query) & second.keys(b, h, query); }
  KeyRange other_keys(Index b, Index h, Index query) const requires TwoRangeMask<A> {
    return first.other_keys(b, h, query) & second.keys(b, h, query);
  }
  KeyRange other_keys(Index b, Index h, Index query) const requires TwoRangeMask<B> {
    return first.keys(b, h, query) & second.other_keys(b, h, query);
  }
};
template <Mask A, Mask B>
BothMasks(A, B) -> BothMasks<A, B>;

}  // namespace headroom::inline v0::core
