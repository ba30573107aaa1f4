#pragma once

#include "headroom/core/bfloat16_product.hpp"
#include "headroom/core/rows.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Rows of one head's q, k, v or output gradient for products in bfloat16: as they lie, or with positions, which are
/// computed in float and rounded.
class Bfloat16Rows {
  static constexpr Index N = simd::kLanes<float>;

 public:
  Bfloat16Rows() = default;
  explicit Bfloat16Rows(const StoredMatrix& x) : x_(x) {}
  /// `buffer` holds [kLanes][cols()].
  Bfloat16Rows(const StoredMatrix& x, const RowPositions<float>& positions, float* buffer)
      : x_(x), reader_(x, positions), buffer_(positions ? buffer : nullptr) {}

  Index cols() const { return reader_.cols(); }
  /// Rows `range`, as copy_bfloat16_rows() has them.
  void copy(Eigen::bfloat16* to, Index rows, Index stride, KeyRange range, float sign) const {
    const Index count = range.end - range.begin;
    if (buffer_ == nullptr) return copy_bfloat16_rows(to, rows, stride, x_.middle_rows(range.begin, count), sign);
    for (Index i = 0; i < count; i += N) {
      const MatrixView<const float> part = reader_.rows(range.begin + i, std::min(N, count - i), buffer_);
      for (Index r = 0; r < part.rows; ++r) {
        Eigen::bfloat16* const row = to + (i + r) * stride;
        round_row(row, 1, &part(r, 0), part.cols);
        for (Index d = 0; d < part.cols && sign < 0; ++d) row[d] = -row[d];
        std::fill(row + part.cols, row + stride, Eigen::bfloat16(0));
      }
    }
    std::fill(to + count * stride, to + rows * stride, Eigen::bfloat16(0));
  }

 private:
  StoredMatrix x_;
  RowReader<float> reader_{x_};
  float* buffer_ = nullptr;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
