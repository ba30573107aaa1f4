#pragma once

#include <cstddef>

#include "headroom/core/view.hpp"

namespace headroom::inline v0::core::detail {

/// A piece of a workspace whose user decides what it holds.
class Piece {
 public:
  Piece() = default;
  explicit Piece(std::byte* start) : start_(start) {}

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }

 private:
  std::byte* start_ = nullptr;
};

/// Hands out pieces of a workspace, each aligned to a cache line. With a null start it only measures.
class Scratch {
 public:
  explicit Scratch(std::byte* start) : start_(start) {}

  /// Memory for `count` elements of T.
  template <class T>
  Piece take_piece(Index count) {
    const Piece piece(start_ == nullptr ? nullptr : start_ + bytes_);
    bytes_ += (count * static_cast<Index>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  template <class T>
  T* take(Index count) {
    return take_piece<T>(count).template as<T>();
  }
  Index bytes() const { return bytes_; }

 private:
  std::byte* start_;
  Index bytes_ = 0;
};

}  // namespace headroom::inline v0::core::detail
