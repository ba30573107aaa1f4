#pragma once

#include <concepts>
#include <cstddef>

#include "headroom/core/error.hpp"
#include "headroom/core/view.hpp"

namespace headroom::inline v0::core {

/// Element types that tensors may be stored in.
template <class T>
concept Storable = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, Eigen::bfloat16> ||
    std::same_as<T, Eigen::half>;

/// What is computed in when elements are stored as T.
template <Storable T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class StoredType : unsigned char { float32, float64, bfloat16, float16 };

template <Storable T>
inline constexpr StoredType kStoredType = std::is_same_v<T, float>             ? StoredType::float32
                                          : std::is_same_v<T, double>          ? StoredType::float64
                                          : std::is_same_v<T, Eigen::bfloat16> ? StoredType::bfloat16
                                                                               : StoredType::float16;

/// Bytes of an element.
constexpr Index size_of(StoredType type) {
  return type == StoredType::float64 ? 8 : type == StoredType::float32 ? 4 : 2;
}

/// A MatrixView whose element type is known at run time: kernels are compiled once for all of them. Its functions are
/// part of whoever calls them, like those of StoredTensor: kernels of several instruction sets do.
struct StoredMatrix {
  void* data = nullptr;
  StoredType type = StoredType::float32;
  Index rows = 0, cols = 0, row_stride = 0, col_stride = 0;

  template <Storable T>
  bool holds() const {
    return type == kStoredType<T>;
  }
  template <Storable T>
  MatrixView<T> as() const {
    return {static_cast<T*>(data), rows, cols, row_stride, col_stride};
  }
  /// f(MatrixView<T>) with the type that is stored.
  template <class F>
  EIGEN_ALWAYS_INLINE decltype(auto) visit(F&& f) const {
    switch (type) {
      case StoredType::float64:
        return f(as<double>());
      case StoredType::bfloat16:
        return f(as<Eigen::bfloat16>());
      case StoredType::float16:
        return f(as<Eigen::half>());
      default:
        return f(as<float>());
    }
  }
  /// The block [rows, cols] that starts at (row, col).
  EIGEN_ALWAYS_INLINE StoredMatrix block(Index row, Index col, Index block_rows, Index block_cols) const {
    std::byte* const start = static_cast<std::byte*>(data) + (row * row_stride + col * col_stride) * size_of(type);
    return {start, type, block_rows, block_cols, row_stride, col_stride};
  }
  EIGEN_ALWAYS_INLINE StoredMatrix middle_rows(Index first, Index count) const { return block(first, 0, count, cols); }
  StoredMatrix transposed() const { return {data, type, cols, rows, col_stride, row_stride}; }
};

/// A TensorView whose element type is known at run time. Default: no tensor at all.
struct StoredTensor {
  void* data = nullptr;
  StoredType type = StoredType::float32;
  std::array<Index, 4> shape{}, strides{};

  StoredTensor() = default;
  template <class T>
  requires Storable<std::remove_const_t<T>> StoredTensor(const TensorView<T>& view)
      : data(const_cast<std::remove_const_t<T>*>(view.data)),
        type(kStoredType<std::remove_const_t<T>>),
        shape(view.shape),
        strides(view.strides) {}

  explicit operator bool() const { return data != nullptr; }
  Index length() const { return shape[2]; }
  Index dim() const { return shape[3]; }
  Index size() const { return shape[0] * shape[1] * shape[2] * shape[3]; }

  /// The matrix [L,D] that batch b and head h of `heads` heads use: one batch serves all, and shape[1] heads serve
  /// `heads` heads in equal runs (grouped-query attention).
  EIGEN_ALWAYS_INLINE StoredMatrix head(Index b, Index h, Index heads) const {
    const Index own_b = shape[0] == 1 ? 0 : b, own_h = shape[1] == heads ? h : h * shape[1] / heads;
    std::byte* const start = static_cast<std::byte*>(data) + (own_b * strides[0] + own_h * strides[1]) * size_of(type);
    return {start, type, shape[2], shape[3], strides[2], strides[3]};
  }
  /// Element (b, h, i, j) as a double.
  EIGEN_ALWAYS_INLINE double at(Index b, Index h, Index i, Index j) const {
    const StoredMatrix element{data, type, 1, 1, 0, 0};
    const Index offset = b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
    return element.visit([&](auto view) { return static_cast<double>(view.data[offset]); });
  }
};

}  // namespace headroom::inline v0::core
