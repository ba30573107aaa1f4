#pragma once

#include "headroom/core/attention/float_forward.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Products of the forward pass in bfloat16, summed in float: weights are rounded to bfloat16, sums are not. Where
/// values are not finite, they are multiplied in float.
class Bfloat16Forward {
  using Packet = simd::Packet<float>;
  using Tile = ForwardTile<float>;
  using Scores = typename Tile::Scores;
  static constexpr Index N = simd::kLanes<float>;
  static constexpr Index kKeysAStep = 4;                                                           // of reading ahead
  static constexpr Index kKeyRows = kBlockSize + kVnniRows, kValueRows = kBlockSize + kVnniDepth;  // zeros at the end

 public:
  struct Memory {
    Eigen::bfloat16 *key_rows, *value_rows, *value_columns;  // [key rows][padded D], [value rows][padded Dv], transpose
    VnniPair *pairs, *weights;                               // [padded Dv/2][value rows], [keys/2][width]
    float* buffer;                                           // of Bfloat16Rows

    Memory(Scratch& scratch, Index dim, Index value_dim) {
      buffer = scratch.take<float>(N * dim);
      dim = padded(dim, kVnniDepth), value_dim = padded(value_dim, kVnniDepth);
      key_rows = scratch.take<Eigen::bfloat16>(kKeyRows * dim);
      value_rows = scratch.take<Eigen::bfloat16>(kValueRows * value_dim);
      value_columns = scratch.take<Eigen::bfloat16>(value_dim * kValueRows);
      pairs = scratch.take<VnniPair>(value_dim / 2 * kValueRows);
      weights = scratch.take<VnniPair>(kBlockSize / 2 * LaneTiling<float>::kWidth);
    }
  };

  Bfloat16Forward(const Memory& memory, const FloatForward<float>& in_float, const Head<float>& head)
      : memory_(memory),
        in_float_(in_float),
        ahead_(head.ahead),
        q_(head.of(head.x.q), head.query_positions(), memory.buffer),
        k_(head.of(head.x.k), head.key_positions(), memory.buffer),
        v_(head.of(head.x.v)),
        sign_(head.score.sign()),
        dim_(padded(q_.cols(), kVnniDepth)),
        value_dim_(padded(v_.cols, kVnniDepth)) {}

  template <int Vectors, class F>
  void with_head_dim(F&& f) const {
    f.template operator()<Eigen::Dynamic>();
  }
  Index output_rows() const { return padded(v_.cols, kVnniRows); }

  void load_queries(const Tile& tile, KeyRange rows) const {
    const Index width = tile.width();
    q_.copy(memory_.key_rows, width, dim_, rows, sign_);
    pack_vnni_lanes(tile.query.as<VnniPair>(), width, {memory_.key_rows, width, dim_, dim_});
  }
  void load_keys(KeyRange block) {
    const Index count = block.end - block.begin, value_rows = padded(count, kVnniRows) + kVnniDepth;
    block_ = block;
    k_.copy(memory_.key_rows, count + kVnniRows, dim_, block, 1);
    copy_bfloat16_rows(memory_.value_rows, value_rows, value_dim_, v_.middle_rows(block.begin, count), 1);
    finite_values_ = are_finite(memory_.value_rows, count * value_dim_);
    if (!finite_values_) return in_float_.load_values(block);
    transpose_bfloat16(memory_.value_columns, kValueRows, {memory_.value_rows, value_rows, value_dim_, value_dim_},
                       memory_.pairs);
  }

  template <int Vectors, int HeadDim, class Finish>
  EIGEN_ALWAYS_INLINE void scores(const Tile& tile, const Scores& scores, KeyRange inside, Finish& finish) const {
    constexpr Index width = Vectors * N;
    const Index count = scores.key_count();
    multiply<Vectors, false>({memory_.key_rows + (scores.keys.begin - block_.begin) * dim_, dim_,
                              tile.query.as<VnniPair>(), width, padded(count, kVnniRows), dim_ / 2, scores.data,
                              width});
    float* const to = scores.data;  // a copy: stores might change what a reference refers to
    const auto finish_keys = [&]<bool Borders>(KeyRange part) __attribute__((always_inline)) {
      for (Index key = part.begin; key < part.end; ++key) {
        if (key % kKeysAStep == 0) ahead_.step();
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          float* const at = to + key * width + v * N;
          const Packet s = finish.template operator()<Borders>(key, v, simd::load(at));
          if constexpr (Borders) simd::store(at, s);
        }
      }
    };
    finish_keys.template operator()<true>({0, inside.begin});
    finish_keys.template operator()<false>(inside);
    finish_keys.template operator()<true>({inside.end, count});
  }

  template <int Vectors>
  EIGEN_ALWAYS_INLINE void weights(SoftmaxBlock<float, Vectors>& softmax, const Scores& scores, bool final) {
    constexpr Index width = Vectors * N;
    const Index count = scores.key_count();
    Index key = 0;
    for (; final && finite_values_ && key + 2 <= count; key += 2) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const float* const at = scores.data + key * width + v * N;
        const Packet even = softmax.weight(v, simd::load(at)), odd = softmax.weight(v, simd::load(at + width));
        store_vnni(memory_.weights + key / 2 * width + v * N, even, odd);
      }
    }
    packed_keys_ = key;
    softmax.weights(scores.data, key, count);
  }

  template <int Vectors, int HeadDim>
  EIGEN_ALWAYS_INLINE void add_values(const Tile& tile, const Scores& weights, const Packet (&decay)[Vectors]) const {
    constexpr Index width = Vectors * N;
    if (!finite_values_) return in_float_.template add_values<Vectors, HeadDim>(tile, weights, decay);
    const Index count = weights.key_count(), depth = padded(count, kVnniDepth);
    pack_vnni_rows<Vectors>(memory_.weights, weights.data, packed_keys_, count, depth);
    for (int v = 0; v < Vectors; ++v) {
      if (Eigen::internal::predux_min(decay[v]) == 1) continue;
      for (Index d = 0; d < output_rows(); ++d) {
        float* const o = tile.output + d * width + v * N;
        simd::store(o, simd::pmul(simd::load(o), decay[v]));
      }
    }
    multiply<Vectors, true>({memory_.value_columns + (weights.keys.begin - block_.begin), kValueRows, memory_.weights,
                             width, output_rows(), depth / 2, tile.output, width});
  }

 private:
  Memory memory_;
  FloatForward<float> in_float_;
  ReadAhead& ahead_;
  Bfloat16Rows q_, k_;
  StoredMatrix v_;
  float sign_;
  Index dim_, value_dim_;  // padded
  KeyRange block_;
  bool finite_values_ = false;
  Index packed_keys_ = 0;  // keys whose weights are packed already
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
