#pragma once

#include <Eigen/Core>
#include <array>
#include <ostream>
#include <type_traits>

namespace headroom::inline v0::core {

/// Of elements, rows and heads: signed, as Eigen's are.
using Index = Eigen::Index;

/// A strided matrix [rows, cols] over memory that somebody else owns; strides count elements.
template <class Scalar>
struct MatrixView {
  Scalar* data = nullptr;
  Index rows = 0, cols = 0;
  Index row_stride = 0, col_stride = 1;

  Scalar& operator()(Index row, Index col) const { return data[row * row_stride + col * col_stride]; }
  /// Where a row begins. One without elements may have no memory.
  Scalar* row(Index i) const { return cols == 0 ? data : data + i * row_stride; }
  MatrixView middle_rows(Index first, Index count) const {
    return {data + first * row_stride, count, cols, row_stride, col_stride};
  }
  operator MatrixView<const Scalar>() const requires(!std::is_const_v<Scalar>) {
    return {data, rows, cols, row_stride, col_stride};
  }
};

/// A strided tensor [B,H,L,D] (batch, head, position, feature) over memory that somebody else owns; strides count
/// elements, may be zero (broadcast) or negative, and no dimension has to be contiguous.
template <class Scalar>
struct TensorView {
  Scalar* data = nullptr;
  std::array<Index, 4> shape{};
  std::array<Index, 4> strides{};

  Index batch() const { return shape[0]; }
  Index heads() const { return shape[1]; }
  Index length() const { return shape[2]; }
  Index dim() const { return shape[3]; }

  Scalar& operator()(Index b, Index h, Index l, Index d) const {
    return data[b * strides[0] + h * strides[1] + l * strides[2] + d * strides[3]];
  }
  /// The matrix [L,D] of one head.
  MatrixView<Scalar> head(Index b, Index h) const {
    return {data + b * strides[0] + h * strides[1], shape[2], shape[3], strides[2], strides[3]};
  }
  operator TensorView<const Scalar>() const requires(!std::is_const_v<Scalar>) { return {data, shape, strides}; }
};

/// View of a dense row-major array [B,H,L,D].
template <class Scalar>
TensorView<Scalar> dense_view(Scalar* data, Index batch, Index heads, Index length, Index dim) {
  return {data, {batch, heads, length, dim}, {heads * length * dim, length * dim, dim, 1}};
}

/// View of an Eigen matrix [L,D] (row- or column-major, map or block with an inner stride) as one head [1,1,L,D], or of
/// a matrix [L,H*D] whose heads are blocks of D columns as [1,H,L,D].
template <class Derived>
auto matrix_view(Eigen::DenseBase<Derived>& matrix, Index heads = 1) {
  Derived& m = matrix.derived();
  using Scalar = std::remove_pointer_t<decltype(m.data())>;
  const Index dim = m.cols() / heads;
  return TensorView<Scalar>{
      m.data(), {1, heads, m.rows(), dim}, {0, dim * m.colStride(), m.rowStride(), m.colStride()}};
}
/// The same of a matrix that is only read.
template <class Derived>
auto matrix_view(const Eigen::DenseBase<Derived>& matrix, Index heads = 1) {
  const Derived& m = matrix.derived();
  const Index dim = m.cols() / heads;
  return TensorView<const typename Derived::Scalar>{
      m.data(), {1, heads, m.rows(), dim}, {0, dim * m.colStride(), m.rowStride(), m.colStride()}};
}

/// Prints a shape as [2,4,100,16].
struct Shape {
  const std::array<Index, 4>& extents;
  friend std::ostream& operator<<(std::ostream& out, const Shape& s) {
    return out << '[' << s.extents[0] << ',' << s.extents[1] << ',' << s.extents[2] << ',' << s.extents[3] << ']';
  }
};

}  // namespace headroom::inline v0::core
