#pragma once

#include <cmath>
#include <limits>
#include <numbers>
#include <optional>

#include "headroom/core/dropout.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/mask.hpp"
#include "headroom/core/stored.hpp"

namespace headroom::inline v0::core {

/// What attention does with a score before the softmax, beside the ranges of a Mask:
///   softcap(scale·q·kᵀ) + bias + relative_bias - slope·|distance|.
/// Query i stands at position p(i) among the keys; its distance to key j is p(i) - j. Views may have stride 0 wherever
/// they are broadcast; one without data is not there.
struct AttentionParams {
  std::optional<double> scale = {};        // 1/sqrt(D) unless given
  double softcap = 0;                      // s becomes softcap·tanh(s / softcap); 0: s stays
  Index query_offset = 0;                  // p(i) = i + query_offset
  const Index* query_positions = nullptr;  // [Lq], instead of the offset
  StoredTensor bias = {};                  // [B,H,Lq,Lk]
  StoredTensor relative_bias = {};         // [1,H,1,2R-1]: element R-1+distance; distances beyond take the outermost
  StoredTensor slopes = {};                // [B,H,Lq,1]
  StoredTensor sink = {};                  // [1,H,1,1]: a score without a value
  TensorView<const bool> mask = {};        // [B,H,Lq,Lk]
  bool mask_visible = true;                // the value in `mask` that lets a query see a key
  TensorView<const bool> block_mask = {};  // [B,H,ceil(Lq/block_size),ceil(Lk/block_size)], true: visible
  Index block_size = 128;
  StoredTensor rotary = {};  // [1,1,rows,2·pairs] of what is computed in: cosine, sine, …; turns q and k
  const Index* rotary_query_rows = nullptr;  // [Lq]: row of the table for a query, p(i) unless given
  const Index* rotary_key_rows = nullptr;    // [Lk]: row of the table for a key, j unless given
  Dropout dropout = {};
  Index first_head = 0;  // where b·H + h starts counting, for dropout

  double scale_for(Index dim) const {
    return scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<Index>(dim, 1))));
  }
  Index position(Index query) const { return query_positions ? query_positions[query] : query + query_offset; }
  Index rotary_row_of_query(Index i) const { return rotary_query_rows ? rotary_query_rows[i] : position(i); }
  Index rotary_row_of_key(Index j) const { return rotary_key_rows ? rotary_key_rows[j] : j; }
};

namespace detail {

/// The tensors of a forward pass, as the kernels see them.
struct AttentionTensors {
  StoredTensor q, k, v, output;
  TensorView<double> lse;

  Index batch() const { return q.shape[0]; }
  Index heads() const { return q.shape[1]; }
};

/// Fails unless q [B,H,Lq,D], k [B or 1,Hk,Lk,D], v [B or 1,Hk,Lk,Dv], output [B,H,Lq,Dv] and lse [B,H,Lq,1] agree.
inline void check_shapes(const AttentionTensors& x, const AttentionParams& params) {
  const auto expect = [](const char* name, const std::array<Index, 4>& given, const std::array<Index, 4>& expected) {
    require(given == expected, "headroom.core.attention.shape", name, " has shape ", Shape{given}, ", expected ",
            Shape{expected}, " from the shapes of q [B,H,Lq,D], k [B,Hk,Lk,D] and v [B,Hk,Lk,Dv]");
  };
  const auto [batch, heads, queries, dim] = x.q.shape;
  const Index keys = x.k.length(), k_batch = x.k.shape[0] == 1 ? 1 : batch, k_heads = x.k.shape[1];
  require(heads == k_heads || (k_heads > 0 && heads % k_heads == 0), "headroom.core.attention.shape", "k has ", k_heads,
          " heads, expected a divisor of the ", heads, " heads of q");
  expect("k", x.k.shape, {k_batch, k_heads, keys, dim});
  expect("v", x.v.shape, {k_batch, k_heads, keys, x.v.dim()});
  expect("the output", x.output.shape, {batch, heads, queries, x.v.dim()});
  if (x.lse.data != nullptr) expect("lse", x.lse.shape, {batch, heads, queries, 1});
  if (params.bias) expect("bias", params.bias.shape, {batch, heads, queries, keys});
  if (params.mask.data != nullptr) expect("mask", params.mask.shape, {batch, heads, queries, keys});
  if (params.slopes) expect("slopes", params.slopes.shape, {batch, heads, queries, 1});
  if (params.sink) expect("sink", params.sink.shape, {1, heads, 1, 1});
  if (params.relative_bias) {
    expect("relative_bias", params.relative_bias.shape, {1, heads, 1, params.relative_bias.dim()});
    require(params.relative_bias.dim() % 2 == 1, "headroom.core.attention.shape", "relative_bias has ",
            params.relative_bias.dim(), " elements a head, expected an odd number, 2R-1");
  }
  if (params.block_mask.data != nullptr) {
    const Index size = params.block_size;
    require(size > 0, "headroom.core.attention.shape", "block_size is ", size, ", expected a positive number");
    const auto blocks = [&](Index length) { return length / size + (length % size != 0); };
    expect("block_mask", params.block_mask.shape, {batch, heads, blocks(queries), blocks(keys)});
  }
  if (params.rotary) {
    const StoredTensor& table = params.rotary;
    bool rows_exist = true;
    for (Index i = 0; i < queries; ++i) {
      rows_exist &= 0 <= params.rotary_row_of_query(i) && params.rotary_row_of_query(i) < table.length();
    }
    for (Index j = 0; j < keys; ++j) {
      rows_exist &= 0 <= params.rotary_row_of_key(j) && params.rotary_row_of_key(j) < table.length();
    }
    const bool narrow = x.q.type != StoredType::float64;
    require(rows_exist && table.dim() % 2 == 0 && table.dim() <= dim && (table.strides[3] == 1 || table.dim() == 0) &&
                table.type == (narrow ? StoredType::float32 : StoredType::float64),
            "headroom.core.attention.shape", "the rotary table ", Shape{table.shape},
            " does not fit; expected [1,1,rows,2·pairs] of the type that is computed in, with at most D = ", dim,
            " columns next to each other and a row for every position");
  }
  const double scale = params.scale_for(dim);
  require(std::abs(scale) <= std::numeric_limits<float>::max(), "headroom.core.attention.scale", "scale is ", scale,
          ", expected a finite number");
  require(params.dropout.probability >= 0 && params.dropout.probability < 1, "headroom.core.attention.dropout",
          "dropout is ", params.dropout.probability, ", expected a probability below 1");
  // Positions are compared as floats, which hold whole numbers up to 2^24.
  require(keys < (Index(1) << 24), "headroom.core.attention.length", "k has ", keys,
          " positions, at most 2^24 are supported");
}

/// Fails when elements of a tensor that is written to share memory.
inline void check_writable(const char* name, const StoredTensor& x) {
  for (int d = 0; d < 4; ++d) {
    require(x.strides[d] != 0 || x.shape[d] <= 1 || x.size() == 0, "headroom.core.attention.output", name, " ",
            Shape{x.shape}, " is expanded: its elements share memory; give it memory of its own");
  }
}

/// A mask seen through a function pointer, so that the kernels are compiled once for all masks.
class MaskRef {
 public:
  template <Mask M>
  explicit MaskRef(const M& mask)
      : mask_(&mask),
        ranges_([](const void* self, Index b, Index h, KeyRange queries, Index keys, Index* begin, Index* end) {
          for (Index i = 0; i < queries.end - queries.begin; ++i) {
            const KeyRange range = static_cast<const M*>(self)->keys(b, h, queries.begin + i);
            begin[i] = std::max<Index>(range.begin, 0);
            end[i] = std::min(range.end, keys);
          }
        }) {}

  /// begin[i] and end[i]: which of `keys` keys the i-th of a run of queries sees.
  void ranges(Index b, Index h, KeyRange queries, Index keys, Index* begin, Index* end) const {
    ranges_(mask_, b, h, queries, keys, begin, end);
  }

 private:
  const void* mask_;
  void (*ranges_)(const void* mask, Index b, Index h, KeyRange queries, Index keys, Index* begin, Index* end);
};

/// The smallest range that holds all ranges [begin[i], end[i]).
template <class T>
KeyRange hull(const T* begin, const T* end, Index count, Index keys) {
  T first = static_cast<T>(keys), last = 0;
  for (Index i = 0; i < count; ++i) {
    const bool empty = begin[i] >= end[i];
    first = !empty && begin[i] < first ? begin[i] : first;
    last = !empty && end[i] > last ? end[i] : last;
  }
  return {static_cast<Index>(first), static_cast<Index>(last)};
}

/// The smallest range that holds both, of which {keys, 0} is none.
inline KeyRange hull(KeyRange a, KeyRange b) { return {std::min(a.begin, b.begin), std::max(a.end, b.end)}; }

/// Hands out pieces of a workspace, each aligned to a cache line. With a null start it only measures.
class Scratch {
 public:
  explicit Scratch(std::byte* start) : start_(start) {}

  template <class T>
  T* take(Index count) {
    T* piece = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + bytes_);
    bytes_ += (count * static_cast<Index>(sizeof(T)) + 63) / 64 * 64;
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
