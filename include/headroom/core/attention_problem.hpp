#pragma once

#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

#include "headroom/core/error.hpp"
#include "headroom/core/mask.hpp"
#include "headroom/core/view.hpp"

namespace headroom::inline v0::core {

/// Parameters of softmax(scale·q·kᵀ)·v.
struct AttentionParams {
  std::optional<double> scale;  // 1/sqrt(D) unless given

  double scale_for(Index dim) const {
    return scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<Index>(dim, 1))));
  }
};

namespace detail {

/// Fails unless q [B,H,Lq,D], k [B,H,Lk,D], v [B,H,Lk,Dv], output [B,H,Lq,Dv] and lse [B,H,Lq,1] agree.
template <class Scalar>
void check_shapes(const TensorView<const Scalar>& q, const TensorView<const Scalar>& k,
                  const TensorView<const Scalar>& v, const TensorView<const Scalar>& output,
                  const TensorView<const double>& lse, const AttentionParams& params) {
  const auto expect = [](const char* name, const std::array<Index, 4>& given, const std::array<Index, 4>& expected) {
    require(given == expected, "headroom.core.attention.shape", name, " has shape ", Shape{given}, ", expected ",
            Shape{expected}, " from the shapes of q [B,H,Lq,D], k [B,H,Lk,D] and v [B,H,Lk,Dv]");
  };
  const std::array<Index, 4> of_q = q.shape;
  expect("k", k.shape, {of_q[0], of_q[1], k.length(), of_q[3]});
  expect("v", v.shape, {of_q[0], of_q[1], k.length(), v.dim()});
  expect("the output", output.shape, {of_q[0], of_q[1], of_q[2], v.dim()});
  if (lse.data != nullptr) expect("lse", lse.shape, {of_q[0], of_q[1], of_q[2], 1});
  const double scale = params.scale_for(q.dim());
  require(std::abs(scale) <= std::numeric_limits<float>::max(), "headroom.core.attention.scale", "scale is ", scale,
          ", expected a finite number");
  // Positions are compared in the scalar type, which holds whole numbers up to 2^digits.
  require(k.length() < (Index(1) << std::numeric_limits<Scalar>::digits), "headroom.core.attention.length", "k has ",
          k.length(), " positions, at most 2^", std::numeric_limits<Scalar>::digits, " are supported");
}

/// A mask seen through a function pointer, so that the kernels are compiled once for all masks.
struct MaskRef {
  const void* mask;
  void (*keys)(const void* mask, Index b, Index h, Index first_query, Index queries, Index length, KeyRange* ranges);

  template <Mask M>
  explicit MaskRef(const M& m)
      : mask(&m),
        keys([](const void* self, Index b, Index h, Index first, Index queries, Index length, KeyRange* ranges) {
          for (Index i = 0; i < queries; ++i) {
            ranges[i] = static_cast<const M*>(self)->keys(b, h, first + i) & KeyRange{0, length};
          }
        }) {}
};

/// The ranges of a run of queries: per query as lanes or scalars, and what holds for all of them.
template <class Scalar, Index Capacity>
struct QueryRanges {
  alignas(64) Scalar first[Capacity];
  alignas(64) Scalar last[Capacity];  // one past the last key
  KeyRange any;                       // no key outside is seen by any query
  KeyRange all;                       // every key inside is seen by every query

  /// Positions past `queries` repeat the last query's range.
  QueryRanges(const MaskRef& mask, Index b, Index h, Index first_query, Index queries, Index length) {
    KeyRange ranges[Capacity];
    mask.keys(mask.mask, b, h, first_query, queries, length, ranges);
    any = {length, 0};
    all = {0, length};
    for (Index i = 0; i < Capacity; ++i) {
      const KeyRange range = ranges[std::min(i, queries - 1)];
      first[i] = static_cast<Scalar>(range.begin);
      last[i] = static_cast<Scalar>(range.end);
      if (!range.empty()) any = {std::min(any.begin, range.begin), std::max(any.end, range.end)};
      all = all & range;
    }
  }
  QueryRanges() = default;

  bool touches(KeyRange keys) const { return !(any & keys).empty(); }
  bool covers(KeyRange keys) const { return all.begin <= keys.begin && keys.end <= all.end; }
};

/// Hands out pieces of a workspace, each aligned to a cache line. With a null start it only measures.
template <class Scalar>
class Scratch {
 public:
  explicit Scratch(std::byte* start) : start_(start) {}

  Scalar* take(Index count) {
    Scalar* piece = start_ == nullptr ? nullptr : reinterpret_cast<Scalar*>(start_ + bytes_);
    bytes_ += (count * static_cast<Index>(sizeof(Scalar)) + 63) / 64 * 64;
    return piece;
  }
  Index bytes() const { return bytes_; }

 private:
  std::byte* start_;
  Index bytes_ = 0;
};

/// Calls f<HeadDim>() with the head dim as a constant where that pays, else with Eigen::Dynamic. Double is the
/// reference type: one general kernel is enough.
template <class Scalar, class F>
void with_head_dim(Index dim, Index value_dim, F&& f) {
  if constexpr (std::is_same_v<Scalar, float>) {
    if (dim == value_dim) {
      switch (dim) {
        case 16:
          return f.template operator()<16>();
        case 32:
          return f.template operator()<32>();
        case 64:
          return f.template operator()<64>();
      }
    }
  }
  f.template operator()<Eigen::Dynamic>();
}

}  // namespace detail
}  // namespace headroom::inline v0::core
