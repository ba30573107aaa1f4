#pragma once

#include "headroom/core/attention/float_backward.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Products of the backward pass in bfloat16, summed in float: P and dS are rounded to bfloat16, sums are not.
class Bfloat16Backward {
  using Packet = simd::Packet<float>;
  using Tile = BackwardTile<float>;
  static constexpr Index N = simd::kLanes<float>;
  static constexpr Index kRowsAStep = 4;  // of reading ahead

 public:
  /// A sum over queries is padded with those that follow: all queries of a block take part.
  static constexpr bool kWholeBlocks = true;

  Bfloat16Backward(const BackwardMemory<float>& memory, const Head<float>& head)
      : memory_(memory),
        k_(head.of(head.x.k), head.key_positions(), memory.scores.buffer),
        v_(head.of(head.x.v)),
        ahead_(head.ahead),
        sign_(head.score.sign()),
        scale_(static_cast<float>(head.score.scale())),
        dim_(padded(memory.dim, kVnniDepth)),
        value_dim_(padded(memory.value_dim, kVnniDepth)) {}

  void load_key_lanes(const Piece& to, const Tile& tile, KeyRange read) const {
    load_rows(query_columns(), dim_, k_, tile, read);
    pack_lanes(to, tile, query_columns(), dim_, sign_);
  }
  void load_tile(const Tile& tile, KeyRange read) const {
    std::fill_n(tile.grad_key, dim_ * tile.width(), 0.0F);
    std::fill_n(tile.grad_value, value_dim_ * tile.width(), 0.0F);
    load_rows(query_rows(), dim_, k_, tile, read);
    pack_key_rows(tile);
    pack_lanes(tile.key, tile, query_rows(), dim_, sign_);
    load_rows(grad_rows(), value_dim_, v_, tile, read);
    pack_lanes(tile.value, tile, grad_rows(), value_dim_, 1);
  }

  void use_head(const Head<float>& head, const StoredMatrix& grad_output) {
    q_ = Bfloat16Rows(head.of(head.x.q), head.query_positions(), memory_.scores.buffer);
    g_ = Bfloat16Rows(grad_output);
  }
  void load_queries(KeyRange block) { load_rows(query_rows(), dim_, q_, block); }
  void load_block(KeyRange block, bool hides) {
    const Index rows = block.end - block.begin, depth = padded(rows, kVnniDepth);
    load_queries(block);
    load_rows(grad_rows(), value_dim_, g_, block);
    VnniPair* const pairs = memory_.grad_queries.as<VnniPair>();  // while it holds no sums
    transpose_bfloat16(query_columns(), kBlockSize, {query_rows(), depth, dim_, dim_}, pairs);
    transpose_bfloat16(grad_columns(), kBlockSize, {grad_rows(), depth, value_dim_, value_dim_}, pairs);
    spoiled_ = hides && !(are_finite(query_rows(), rows * dim_) && are_finite(grad_rows(), rows * value_dim_));
    if (!spoiled_) return;
    take_out_not_finite(query_columns(), kBlockSize * dim_);
    take_out_not_finite(grad_columns(), kBlockSize * value_dim_);
  }

  template <int Vectors>
  EIGEN_ALWAYS_INLINE void scores(float* scores, const Piece& key_lanes, BlockPart part) const {
    constexpr Index width = Vectors * N;
    multiply<Vectors, false>(
        {query_rows(), dim_, key_lanes.as<VnniPair>(), width, padded(part.rows, kVnniRows), dim_ / 2, scores, width});
  }
  template <int Vectors, class Finish>
  EIGEN_ALWAYS_INLINE void grad_weights(const Tile& tile, BlockPart part, Finish&& finish) const {
    constexpr Index width = Vectors * N;
    float* const to = memory_.grad_scores.as<float>();
    multiply<Vectors, false>({grad_rows(), value_dim_, tile.value.as<VnniPair>(), width, padded(part.rows, kVnniRows),
                              value_dim_ / 2, to, width});
    for (Index row = 0; row < part.rows; ++row) {
      if (row % kRowsAStep == 0) ahead_.step();
      for (int v = 0; v < Vectors; ++v) {
        float* const at = to + row * width + v * N;
        simd::store(at, finish(row, v, simd::load(at)));
      }
    }
  }

  template <int Vectors>
  EIGEN_DONT_INLINE void accumulate(const Tile& tile, BlockPart part) const {
    constexpr Index width = Vectors * N, depth = padded(width, kVnniDepth);
    const Index row_depth = padded(part.rows, kVnniDepth), vector_dim = memory_.vector_dim;
    const float *const weights = memory_.weights.as<float>(), *const grad_scores = memory_.grad_scores.as<float>();
    VnniPair *const weight_pairs = memory_.weights.as<VnniPair>(), *const grad_score_pairs =
                                                                       memory_.grad_scores.as<VnniPair>();
    round_rows<Vectors>(memory_.grad_score_rows(), depth, grad_scores, part.rows);
    pack_vnni_rows<Vectors>(weight_pairs, weights, 0, part.rows, row_depth);
    pack_vnni_rows<Vectors>(grad_score_pairs, grad_scores, 0, part.rows, row_depth);
    multiply<Vectors, true>({grad_columns(), kBlockSize, weight_pairs, width, padded(memory_.value_dim, kVnniRows),
                             row_depth / 2, tile.grad_value, width});
    multiply<Vectors, true>({query_columns(), kBlockSize, grad_score_pairs, width, padded(memory_.dim, kVnniRows),
                             row_depth / 2, tile.grad_key, width});
    for_row_tiles<kTileVectors>(vector_dim / N, [&]<int V>(Index vector) {
      multiply<V, true>({memory_.grad_score_rows(), depth, tile.key_rows.as<VnniPair>() + vector * N, vector_dim,
                         padded(part.rows, kVnniRows), depth / 2, memory_.grad_queries.as<float>() + vector * N,
                         vector_dim});
    });
  }
  void finish_grad_queries(Index rows) const {
    float* const grad_queries = memory_.grad_queries.as<float>();
    for (Index i = 0; i < rows * memory_.vector_dim; ++i) grad_queries[i] *= scale_;
  }

  bool spoiled() const { return spoiled_; }
  float query(Index i, Index d) const { return static_cast<float>(query_rows()[i * dim_ + d]); }
  float grad(Index i, Index d) const { return static_cast<float>(grad_rows()[i * value_dim_ + d]); }

 private:
  // Rows of a block [queries][padded features] and their transposes share a Piece; before, rows of a tile of keys.
  Eigen::bfloat16* query_rows() const { return memory_.queries.as<Eigen::bfloat16>(); }
  Eigen::bfloat16* query_columns() const { return query_rows() + kBlockSize * dim_; }
  Eigen::bfloat16* grad_rows() const { return memory_.grads.as<Eigen::bfloat16>(); }
  Eigen::bfloat16* grad_columns() const { return grad_rows() + kBlockSize * value_dim_; }

  static void load_rows(Eigen::bfloat16* to, Index stride, const Bfloat16Rows& x, KeyRange rows) {
    x.copy(to, padded(rows.end - rows.begin, kVnniDepth), stride, rows, 1);
  }
  /// Rows of a tile, 0 where they are not `read`.
  static void load_rows(Eigen::bfloat16* to, Index stride, const Bfloat16Rows& x, const Tile& tile, KeyRange read) {
    std::fill_n(to, padded(tile.width(), kVnniDepth) * stride, Eigen::bfloat16(0));
    if (read.empty()) return;
    x.copy(to + (read.begin - tile.keys.begin) * stride, read.end - read.begin, stride, read, 1);
  }
  /// Rows become lanes, and are spoiled where the sign is negative.
  static void pack_lanes(const Piece& to, const Tile& tile, Eigen::bfloat16* rows, Index stride, float sign) {
    for (Index i = 0; i < tile.width() * stride && sign < 0; ++i) rows[i] = -rows[i];
    pack_vnni_lanes(to.as<VnniPair>(), tile.width(), {rows, tile.width(), stride, stride});
  }
  /// Rows of keys in VNNI layout, without what is not finite: see FloatBackward::load_tile.
  void pack_key_rows(const Tile& tile) const {
    VnniPair* const pairs = tile.key_rows.as<VnniPair>();
    const Eigen::bfloat16* const rows = query_rows();
    for (Index j = 0; j < padded(tile.width(), kVnniDepth); j += 2) {
      for (Index d = 0; d < memory_.vector_dim; ++d) {
        const auto bits = [&](Index row) -> VnniPair {
          const auto half = Eigen::numext::bit_cast<std::uint16_t>(rows[row * dim_ + d]);
          return (half & 0x7f80U) == 0x7f80U ? 0 : half;
        };
        pairs[j / 2 * memory_.vector_dim + d] = bits(j) | bits(j + 1) << 16;
      }
    }
  }
  static void take_out_not_finite(Eigen::bfloat16* x, Index count) {
    for (Index i = 0; i < count; ++i) x[i] = are_finite(x + i, 1) ? x[i] : Eigen::bfloat16(0);
  }

  const BackwardMemory<float>& memory_;
  Bfloat16Rows k_, v_, q_, g_;
  ReadAhead& ahead_;
  float sign_, scale_;
  Index dim_, value_dim_;  // padded
  bool spoiled_ = false;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
