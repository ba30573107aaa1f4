#pragma once

#include <algorithm>

#include "headroom/core/attention/problem.hpp"
#include "headroom/core/mask.hpp"

namespace headroom::inline v0::core::detail {

/// A mask seen through a function pointer, so that the kernels are compiled once for all masks.
class MaskRef {
 public:
  template <Mask M>
  explicit MaskRef(const M& mask) : mask_(&mask), ranges_(ranges_of<M, false>) {
    if constexpr (TwoRangeMask<M>) other_ranges_ = ranges_of<M, true>;
  }

  /// How many ranges a query has. Each takes one pass over the keys.
  int passes() const { return other_ranges_ == nullptr ? 1 : 2; }
  /// The mask of one pass.
  MaskRef pass(int index) const {
    MaskRef part = *this;
    if (index > 0) part.ranges_ = other_ranges_;
    return part;
  }
  /// begin[i] and end[i]: which of `keys` keys the i-th of a run of queries sees in this pass.
  void ranges(HeadIndex head, KeyRange queries, Index keys, Index* begin, Index* end) const {
    ranges_(mask_, head, queries, begin, end);
    for (Index i = 0; i < queries.end - queries.begin; ++i) {
      begin[i] = std::max<Index>(begin[i], 0), end[i] = std::min(end[i], keys);
    }
  }

 private:
  using Ranges = void (*)(const void* mask, HeadIndex head, KeyRange queries, Index* begin, Index* end);

  template <class M, bool Other>
  static void ranges_of(const void* self, HeadIndex head, KeyRange queries, Index* begin, Index* end) {
    const M& mask = *static_cast<const M*>(self);
    for (Index i = 0; i < queries.end - queries.begin; ++i) {
      KeyRange range;
      if constexpr (Other) {
        range = mask.other_keys(head.b, head.h, queries.begin + i);
      } else {
        range = mask.keys(head.b, head.h, queries.begin + i);
      }
      begin[i] = range.begin, end[i] = range.end;
    }
  }

  const void* mask_;
  Ranges ranges_;
  Ranges other_ranges_ = nullptr;
};

}  // namespace headroom::inline v0::core::detail
