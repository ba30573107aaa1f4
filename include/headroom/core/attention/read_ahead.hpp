#pragma once

#include <algorithm>
#include <tuple>

#include "headroom/core/attention/problem.hpp"
#include "headroom/core/instruction_set.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Fetches what the next head reads and writes into the cache while this one is computed. A short head takes a few
/// microseconds, and the processor, which sees no long run of memory in it, as many again to wait for its operands.
/// Fetched at once they would have to be waited for too, so that products call step() between their register tiles.
class ReadAhead {
 public:
  /// Heads larger than this would push each other out of the cache; within a long head memory is read in long runs.
  static constexpr Index kMostBytes = Index{512} * 1024;

  /// Whether heads of a problem are fetched.
  static bool serves(const auto& problem) {
    const auto bytes = [](const auto&... tensors) {
      return ((tensors.length() * tensors.dim() * size_of(tensors.type)) + ...);
    };
    return std::apply(bytes, problem.streamed()) <= kMostBytes;
  }
  /// Fetches a head in as many steps as there were since it began before; forgets what is left of that one.
  void begin(const auto& problem, HeadIndex head) {
    count_ = at_ = 0, row_ = 0;
    Index rows = 0;
    const auto add = [&](const StoredMatrix& x) {
      StoredMatrix next = x.row_stride == 1 ? x.transposed() : x;
      if (next.col_stride != 1) return;  // elements that lie alone are left alone
      if (next.row_stride == next.cols) {
        const Index piece = kPieceBytes / size_of(x.type);
        next = {x.data, x.type, (x.rows * x.cols + piece - 1) / piece, piece, piece, 1};
      }
      if (next.rows == 0) return;
      matrices_[count_++] = next;
      rows += next.rows;
    };
    const auto add_all = [&](const auto&... tensors) {
      static_assert(sizeof...(tensors) <= kMost);
      (add(tensors.head(head.b, head.h, problem.heads())), ...);
    };
    std::apply(add_all, problem.streamed());
    rows_a_step_ = steps_ == 0 ? rows : (rows + steps_ - 1) / steps_;
    steps_ = 0;
  }
  /// Fetches a few rows more.
  EIGEN_ALWAYS_INLINE void step() {
    ++steps_;
    if (at_ < count_) [[unlikely]]
      fetch();
  }

 private:
  static constexpr int kMost = 8;
  static constexpr Index kPieceBytes = 256;  // what is dense is fetched in rows of so many

  EIGEN_DONT_INLINE void fetch() {
    for (Index i = 0; i < rows_a_step_ && at_ < count_; ++i) {
      const StoredMatrix& x = matrices_[at_];
      const Index bytes = x.cols * size_of(x.type);
      const char* const row = static_cast<const char*>(x.data) + row_ * x.row_stride * size_of(x.type);
      for (Index byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
      if (++row_ == x.rows) ++at_, row_ = 0;
    }
  }

  StoredMatrix matrices_[kMost];
  int count_ = 0, at_ = 0;
  Index row_ = 0, rows_a_step_ = 0, steps_ = 0;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
