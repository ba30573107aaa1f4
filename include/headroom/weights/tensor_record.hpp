#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "headroom/weights/dtype.hpp"

namespace headroom::inline v0::weights {

/// A tensor in a file: which bytes it is, and how they are laid out.
struct TensorRecord {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape = {}, strides = {};  ///< of the same length; strides in elements, none negative
  std::uint64_t begin = 0;                             ///< of the first element, in bytes from the start of the file
  std::uint64_t bytes = 0;                             ///< from there to the end of the last element; within the file
};

/// What a weight file holds.
struct Contents {
  std::vector<TensorRecord> tensors;            ///< sorted by name, each name once
  std::map<std::string, std::string> metadata;  ///< texts beside them, of safetensors files
};

/// More dimensions than this no tensor may have.
inline constexpr std::size_t kMostDimensions = 16;

/// Number of elements of a shape, sizes of 0 taken for 1, in which form it bounds every stride of a contiguous tensor;
/// none where a size is negative or the bytes of all elements are more than an int64 holds.
inline std::optional<std::int64_t> span_of_shape(std::span<const std::int64_t> shape, std::size_t element_bytes) {
  std::int64_t product = static_cast<std::int64_t>(element_bytes);
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(product, std::max<std::int64_t>(size, 1), &product)) return std::nullopt;
  }
  return product / static_cast<std::int64_t>(element_bytes);
}

/// Whether there is nothing in a tensor of this shape.
inline bool is_empty(std::span<const std::int64_t> shape) { return std::ranges::find(shape, 0) != shape.end(); }

/// Bytes of all elements of a shape; none where a size is negative or they are more than an int64 holds.
inline std::optional<std::uint64_t> data_bytes(std::span<const std::int64_t> shape, std::size_t element_bytes) {
  const auto elements = span_of_shape(shape, element_bytes);
  if (!elements.has_value()) return std::nullopt;
  return is_empty(shape) ? 0 : static_cast<std::uint64_t>(*elements) * element_bytes;
}

/// Strides of a tensor whose elements stand one after the other, the last axis innermost. For a shape that
/// span_of_shape accepts.
inline std::vector<std::int64_t> contiguous_strides(std::span<const std::int64_t> shape) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t axis = shape.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * std::max<std::int64_t>(shape[axis], 1);
  }
  return strides;
}

/// Elements from the first to the last one of a strided tensor, 0 of an empty one; none where a stride is negative or
/// the number is more than an int64 holds. For a shape that span_of_shape accepts.
inline std::optional<std::int64_t> extent(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides) {
  std::int64_t last = 0;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    std::int64_t step = 0;
    if (strides[axis] < 0 || __builtin_mul_overflow(std::max<std::int64_t>(shape[axis], 1) - 1, strides[axis], &step) ||
        __builtin_add_overflow(last, step, &last)) {
      return std::nullopt;
    }
  }
  if (is_empty(shape)) return 0;
  return __builtin_add_overflow(last, std::int64_t{1}, &last) ? std::nullopt : std::optional(last);
}

}  // namespace headroom::inline v0::weights
