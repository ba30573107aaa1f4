#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "headroom/core/attention_problem.hpp"
#include "headroom/core/register_tile.hpp"

/// How rows of q, k, v and of gradients come from memory into the kernels and go back: converted to the type that is
/// computed in, rotated, transposed into lanes. Where memory is right as it lies, nothing is copied.
namespace headroom::inline v0::core::detail {

/// Rotary embedding of rows: neighbouring pairs of features turn by the angles of the row's position.
template <class Scalar>
class Rotation {
 public:
  Rotation() = default;
  Rotation(const StoredTensor& table, Index offset, const Index* positions)
      : table_(static_cast<const Scalar*>(table.data)),
        stride_(table.strides[2]),
        pairs_(table.dim() / 2),
        offset_(offset),
        positions_(positions) {}

  explicit operator bool() const { return table_ != nullptr; }

  /// Turns row `index` of the tensor, forward or back.
  void apply(Scalar* row, Index index, bool back) const {
    const Scalar* angle = table_ + (positions_ ? positions_[index] : index + offset_) * stride_;
    const Scalar sign = back ? Scalar(-1) : Scalar(1);
    for (Index p = 0; p < pairs_; ++p) {
      const Scalar x = row[2 * p], y = row[2 * p + 1], cosine = angle[2 * p], sine = sign * angle[2 * p + 1];
      row[2 * p] = x * cosine - y * sine;
      row[2 * p + 1] = x * sine + y * cosine;
    }
  }

 private:
  const Scalar* table_ = nullptr;
  Index stride_ = 0, pairs_ = 0, offset_ = 0;
  const Index* positions_ = nullptr;
};

/// to [rows][cols] = x, dense.
template <class Scalar, class T>
void copy_rows(Scalar* to, MatrixView<T> x) {
  for (Index i = 0; i < x.rows; ++i) {
    const T* from = &x(i, 0);
    Scalar* const row = to + i * x.cols;
    if (x.col_stride == 1) {
      for (Index d = 0; d < x.cols; ++d) row[d] = static_cast<Scalar>(from[d]);
    } else {
      for (Index d = 0; d < x.cols; ++d) row[d] = static_cast<Scalar>(from[d * x.col_stride]);
    }
  }
}
/// The same for a matrix whose columns are contiguous: by registers.
template <class Scalar>
void copy_columns(Scalar* to, MatrixView<const Scalar> x) {
  // rows of the transposed matrix fill the lanes
  pack_lanes(to, x.cols, MatrixView<const Scalar>{x.data, x.cols, x.rows, x.col_stride, x.row_stride}, Scalar(1));
}

/// Rows of one head's q, k, v or output gradient.
template <class Scalar>
class RowReader {
 public:
  RowReader(const StoredMatrix& x, const Rotation<Scalar>& rotation = {})
      : x_(x), rotation_(rotation), plain_(x.holds<Scalar>() && !rotation) {}

  Index cols() const { return x_.cols; }
  /// Rows [first, first + count) with neighbouring features next to each other: where they lie, or in `buffer`
  /// [count][cols].
  MatrixView<const Scalar> rows(Index first, Index count, Scalar* buffer) const {
    if (plain_ && x_.col_stride == 1) return x_.as<Scalar>().middle_rows(first, count);
    const StoredMatrix part = x_.middle_rows(first, count);
    if (part.holds<Scalar>() && part.row_stride == 1) {
      copy_columns<Scalar>(buffer, part.as<Scalar>());
    } else {
      part.visit([&](auto view) { copy_rows(buffer, view); });
    }
    if (rotation_) {
      for (Index i = 0; i < count; ++i) rotation_.apply(buffer + i * x_.cols, first + i, /*back=*/false);
    }
    return {buffer, count, x_.cols, x_.cols, 1};
  }
  /// Rows [first, first + count) as lanes of to [cols][width] from lane `lane` on. `buffer` holds [kLanes][cols].
  template <class Op = Assign>
  void pack(Scalar* to, Index width, Index lane, Index first, Index count, Scalar factor, Scalar* buffer) const {
    if (plain_) {
      return pack_lanes<Op, Scalar>(to + lane, width, x_.as<Scalar>().middle_rows(first, count), factor);
    }
    constexpr Index N = simd::kLanes<Scalar>;
    for (Index i = 0; i < count; i += N) {
      pack_lanes<Op, Scalar>(to + lane + i, width, rows(first + i, std::min(N, count - i), buffer), factor);
    }
  }

 private:
  StoredMatrix x_;
  Rotation<Scalar> rotation_;
  bool plain_;
};

/// Writes rows of one head's output or of a gradient.
template <class Scalar>
class RowWriter {
 public:
  RowWriter(const StoredMatrix& y, const Rotation<Scalar>& rotation = {})
      : y_(y), rotation_(rotation), plain_(y.holds<Scalar>() && !rotation) {}

  /// Whether rows can be summed where they lie.
  bool plain() const { return plain_; }
  MatrixView<Scalar> view() const { return y_.as<Scalar>(); }

  /// Writes dense rows [count][cols], turned back; they are spoiled.
  void write(Index first, Index count, Scalar* rows) const {
    if (rotation_) {
      for (Index i = 0; i < count; ++i) rotation_.apply(rows + i * y_.cols, first + i, /*back=*/true);
    }
    y_.middle_rows(first, count).visit([&](auto view) {
      using T = std::remove_pointer_t<decltype(view.data)>;
      for (Index i = 0; i < count; ++i) {
        for (Index d = 0; d < view.cols; ++d) view(i, d) = static_cast<T>(rows[i * view.cols + d]);
      }
    });
  }
  /// Writes lanes [0, count) of from [cols][width], each times its factor. `buffer` holds [kLanes][cols].
  void unpack(Index first, Index count, const Scalar* from, Index width, const Scalar* factor, Scalar* buffer) const {
    if (plain_) return unpack_lanes(view().middle_rows(first, count), from, width, factor);
    constexpr Index N = simd::kLanes<Scalar>;
    for (Index i = 0; i < count; i += N) {
      const Index rows = std::min(N, count - i);
      unpack_lanes(MatrixView<Scalar>{buffer, rows, y_.cols, y_.cols, 1}, from + i, width, factor + i);
      write(first + i, rows, buffer);
    }
  }

 private:
  StoredMatrix y_;
  Rotation<Scalar> rotation_;
  bool plain_;
};

/// Whether x is neither infinite nor NaN; not optimised away under -ffast-math.
template <class Scalar>
bool is_finite(Scalar x) {
  using Bits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;
  constexpr Bits exponent = sizeof(Scalar) == 4 ? Bits(0x7f800000U) : static_cast<Bits>(0x7ff0000000000000ULL);
  return (std::bit_cast<Bits>(x) & exponent) != exponent;
}
template <class Scalar>
bool row_is_finite(const Scalar* row, Index count) {
  bool finite = true;
  for (Index d = 0; d < count; ++d) finite &= is_finite(row[d]);
  return finite;
}

}  // namespace headroom::inline v0::core::detail
