#pragma once

#include <bit>
#include <cstdint>

#include "headroom/core/finite.hpp"
#include "headroom/core/lanes.hpp"
#include "headroom/core/mask.hpp"
#include "headroom/core/row_positions.hpp"

/// How rows of q, k, v and of gradients come from memory into the kernels and go back: converted to the type that is
/// computed in, with positions, transposed into lanes. Where memory is right as it lies, nothing is copied.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// to[l·stride] = x[l], rounded.
template <class T, class Scalar>
void round_row(T* to, Index stride, const Scalar* x, Index count) {
  if constexpr (std::is_same_v<T, Eigen::bfloat16> && std::is_same_v<Scalar, float>) {
    if (stride == 1) {  // to the nearest, ties to even, said so that the compiler does many at a time
      for (Index l = 0; l < count; ++l) {
        const auto bits = std::bit_cast<std::uint32_t>(x[l]);
        const std::uint32_t nearest = bits + 0x7fffU + (bits >> 16 & 1U), quiet_nan = bits | 0x400000U;
        const std::uint32_t rounded = (bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : nearest;
        to[l] = Eigen::numext::bit_cast<Eigen::bfloat16>(static_cast<std::uint16_t>(rounded >> 16));
      }
      return;
    }
  }
  for (Index l = 0; l < count; ++l) to[l * stride] = static_cast<T>(x[l]);
}
/// to[l·stride] += x[l], added up in the type of x.
template <class T, class Scalar>
void add_strided(T* to, Index stride, const Scalar* x, Index count) {
  const auto add = [&](Index step) __attribute__((always_inline)) {
    for (Index l = 0; l < count; ++l) to[l * step] = static_cast<T>(static_cast<Scalar>(to[l * step]) + x[l]);
  };
  if (stride == 1) {
    add(1);
  } else {
    add(stride);
  }
}
/// to += rows [rows][stride], along the direction in which `to` is contiguous.
template <class T, class Scalar>
void add_rows(MatrixView<T> to, const Scalar* rows, Index stride) {
  if constexpr (std::is_same_v<T, Scalar>) {
    if (to.row_stride == 1 && to.col_stride != 1) {
      return pack_lanes(to.data, to.col_stride, MatrixView<const Scalar>{rows, to.rows, to.cols, stride, 1},
                        TimesPlus<Scalar>{1});
    }
  }
  for (Index i = 0; i < to.rows; ++i) add_strided(to.row(i), to.col_stride, rows + i * stride, to.cols);
}
template <class Scalar>
void clear_rows(MatrixView<Scalar> x) {
  const bool by_columns = x.row_stride == 1;
  if (by_columns) x = {x.data, x.cols, x.rows, x.col_stride, x.row_stride};
  for (Index i = 0; i < x.rows; ++i) {
    if (x.col_stride == 1) {
      std::fill_n(x.row(i), x.cols, Scalar(0));
    } else {
      for (Index d = 0; d < x.cols; ++d) x(i, d) = 0;
    }
  }
}

/// to [rows][cols] = x, dense.
template <class Scalar, class T>
void copy_rows(Scalar* to, MatrixView<T> x) {
  for (Index i = 0; i < x.rows; ++i) {
    const T* from = x.row(i);
    Scalar* const row = to + i * x.cols;
    if constexpr (std::is_same_v<std::remove_const_t<T>, Eigen::bfloat16> && std::is_same_v<Scalar, float>) {
      if (x.col_stride == 1) {  // the upper half of a float, said so that the compiler does many at a time
        for (Index d = 0; d < x.cols; ++d) {
          const auto half = Eigen::numext::bit_cast<std::uint16_t>(from[d]);
          row[d] = std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
        }
        continue;
      }
    }
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
  pack_lanes(to, x.cols, MatrixView<const Scalar>{x.data, x.cols, x.rows, x.col_stride, x.row_stride},
             Times<Scalar>{1});
}

/// Rows of one head's q, k, v or output gradient.
template <class Scalar>
class RowReader {
 public:
  RowReader(const StoredMatrix& x, const RowPositions<Scalar>& positions = {})
      : x_(x), positions_(positions), plain_(x.holds<Scalar>() && !positions) {}

  /// Of rows as they are read.
  Index cols() const { return positions_.features(x_.cols); }
  /// Rows [first, first + count) with neighbouring features next to each other: where they lie, or in `buffer`
  /// [count][cols].
  MatrixView<const Scalar> rows(Index first, Index count, Scalar* buffer) const {
    if (x_.cols == 0) return {buffer, count, 0, 0, 1};  // what has no elements may lie nowhere
    if (plain_ && x_.col_stride == 1) return x_.as<Scalar>().middle_rows(first, count);
    const StoredMatrix part = x_.middle_rows(first, count);
    MatrixView<const Scalar> dense{buffer, count, x_.cols, x_.cols, 1};
    if (part.holds<Scalar>() && part.col_stride == 1) {
      dense = part.as<Scalar>();  // for positions to change
    } else if (part.holds<Scalar>() && part.row_stride == 1) {
      copy_columns<Scalar>(buffer, part.as<Scalar>());
    } else {
      part.visit([&](auto view) { copy_rows(buffer, view); });
    }
    const bool in_place = dense.data == buffer;  // then the last first: rows may become wider
    for (Index n = 0; n < count && positions_; ++n) {
      const Index i = in_place ? count - 1 - n : n;
      positions_.apply(buffer + i * cols(), &dense(i, 0), x_.cols, first + i);
    }
    return {buffer, count, cols(), cols(), 1};
  }
  /// Rows `range` as lanes of `to` [cols][width]. `buffer` holds [kLanes][cols].
  template <class Op>
  void pack(const LaneMatrix<Scalar>& to, KeyRange range, Op op, Scalar* buffer) const {
    const Index first = range.begin, count = range.end - range.begin;
    if (plain_) return pack_lanes<Scalar>(to.data, to.width, x_.as<Scalar>().middle_rows(first, count), op);
    constexpr Index N = simd::kLanes<Scalar>;
    for (Index next = 0; next < count; next += N) {
      const Index i = Op::kOverwrites ? whole_vector(next, count, N) : next;
      pack_lanes(to.data + i, to.width, rows(first + i, std::min(N, count - i), buffer), op);
    }
  }

 private:
  StoredMatrix x_;
  RowPositions<Scalar> positions_;
  bool plain_;
};

/// Writes rows of one head's output or of a gradient.
template <class Scalar>
class RowWriter {
 public:
  /// With `positions` those are gradients of rows that a RowReader with them read. The gradient of phases is added to
  /// `phase`, unless it is null.
  RowWriter(const StoredMatrix& y, const RowPositions<Scalar>& positions = {}, double* phase = nullptr)
      : y_(y), positions_(positions), phase_(phase), plain_(y.holds<Scalar>() && !positions) {}

  /// Of rows as they come.
  Index cols() const { return positions_.features(y_.cols); }
  /// Writes rows [count][stride], of which the first cols() numbers count; they are spoiled.
  void write(Index first, Index count, Scalar* rows, Index stride) const {
    for (Index i = 0; i < count && positions_; ++i) {
      Scalar* const row = rows + i * stride;
      positions_.back(row, row, y_.cols, first + i, phase_);
    }
    y_.middle_rows(first, count).visit([&](auto view) {
      for (Index i = 0; i < count; ++i) round_row(view.row(i), view.col_stride, rows + i * stride, view.cols);
    });
  }
  /// Writes the first lanes of `from` [cols][width], each times its factor, as rows `range`. `buffer` holds
  /// [kLanes][cols].
  void unpack(KeyRange range, const LaneMatrix<Scalar>& from, const Scalar* factor, Scalar* buffer) const {
    const Index first = range.begin, count = range.end - range.begin;
    if (plain_) return unpack_lanes(y_.as<Scalar>().middle_rows(first, count), from.data, from.width, factor);
    constexpr Index N = simd::kLanes<Scalar>;
    for (Index next = 0; next < count; next += N) {
      const Index i = phase_ == nullptr ? whole_vector(next, count, N) : next;  // what is added up comes once
      const Index rows = std::min(N, count - i);
      unpack_lanes(MatrixView<Scalar>{buffer, rows, cols(), cols(), 1}, from.data + i, from.width, factor + i);
      write(first + i, rows, buffer, cols());
    }
  }

 private:
  StoredMatrix y_;
  RowPositions<Scalar> positions_;
  double* phase_;
  bool plain_;
};

/// Sums rows of a gradient up in what is computed in, in the gradient's own memory. Where that is 16 bits an element,
/// it holds the upper half of each sum until the end and `lower` [rows][cols] the other half.
template <class Scalar>
class RowSums {
 public:
  using Half = std::uint16_t;

  RowSums(const StoredMatrix& y, const RowPositions<Scalar>& positions, Half* lower)
      : y_(y), positions_(positions), lower_(lower) {}

  static bool splits(StoredType type) { return type != kStoredType<Scalar>; }

  void clear(Index first, Index count) const {
    if (lower_ == nullptr) return clear_rows(y_.as<Scalar>().middle_rows(first, count));
    clear_rows(upper().middle_rows(first, count));
    std::fill_n(lower_ + first * y_.cols, count * y_.cols, Half(0));
  }
  /// Adds rows [count][stride], as a RowWriter gets them; they are spoiled.
  void add(Index first, Index count, Scalar* rows, Index stride) const {
    positions_.before_sum(rows, stride, first, count);
    if (lower_ == nullptr) return add_rows<Scalar, Scalar>(y_.as<Scalar>().middle_rows(first, count), rows, stride);
    for (Index i = 0; i < count; ++i) {
      each_sum(first + i, [&](Index d, Scalar sum) { return sum + rows[i * stride + d]; });
    }
  }
  /// Writes rows [count][stride] that are whole sums, instead of all of the others; they are spoiled.
  void put(Index first, Index count, Scalar* rows, Index stride) const {
    RowWriter<Scalar>(y_, positions_).write(first, count, rows, stride);
  }
  /// Makes gradients of the sums and rounds them. `buffer` holds [cols].
  void finish(Index first, Index count, Scalar* buffer) const {
    if (lower_ == nullptr && !positions_) return;
    for (Index i = first; i < first + count; ++i) {
      if (lower_ == nullptr) {
        copy_rows(buffer, y_.as<Scalar>().middle_rows(i, 1));
      } else {
        each_sum(i, [&](Index d, Scalar sum) { return buffer[d] = sum; });
      }
      positions_.after_sum(buffer, y_.cols, i);
      RowWriter<Scalar>(y_).write(i, 1, buffer, y_.cols);
    }
  }

 private:
  MatrixView<Half> upper() const {
    return {static_cast<Half*>(y_.data), y_.rows, y_.cols, y_.row_stride, y_.col_stride};
  }
  /// sum = f(column, sum) along a row.
  template <class F>
  EIGEN_ALWAYS_INLINE void each_sum(Index row, F&& f) const {
    if constexpr (std::is_same_v<Scalar, float>) {
      Half *const high = &upper()(row, 0), *const low = lower_ + row * y_.cols;
      const auto run = [&](Index step) __attribute__((always_inline)) {
        for (Index d = 0; d < y_.cols; ++d) {
          const std::uint32_t before = static_cast<std::uint32_t>(high[d * step]) << 16 | low[d];
          const auto bits = std::bit_cast<std::uint32_t>(f(d, std::bit_cast<float>(before)));
          high[d * step] = static_cast<Half>(bits >> 16), low[d] = static_cast<Half>(bits);
        }
      };
      if (y_.col_stride == 1) {
        run(1);
      } else {
        run(y_.col_stride);
      }
    }
  }

  StoredMatrix y_;
  RowPositions<Scalar> positions_;
  Half* lower_;
};

template <class Scalar>
bool row_is_finite(const Scalar* row, Index count) {
  bool finite = true;
  for (Index d = 0; d < count; ++d) finite &= is_finite(row[d]);
  return finite;
}
template <class Scalar>
bool rows_are_finite(MatrixView<const Scalar> x) {
  bool finite = true;
  for (Index i = 0; i < x.rows && finite; ++i) finite = row_is_finite(x.row(i), x.cols);
  return finite;
}

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
