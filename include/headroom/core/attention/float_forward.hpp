#pragma once

#include "headroom/core/attention/products.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// A tile of queries in the forward pass.
template <class Scalar>
struct ForwardTile {
  using Run = QueryRun<Scalar, LaneTiling<Scalar>::kWidth>;
  using Scores = TileScores<Scalar, LaneTiling<Scalar>::kWidth, true>;

  Piece query;     // [D][width], or in VNNI layout
  Scalar* output;  // [Dv][width]: sum of weights times values
  SoftmaxState<Scalar> softmax;
  Run run;
  int vectors;

  Index width() const { return vectors * Index(simd::kLanes<Scalar>); }
};

/// Products of the forward pass in float or double: queries in lanes, keys and values read where they lie.
template <class Scalar>
class FloatForward {
  using Packet = simd::Packet<Scalar>;
  using Tile = ForwardTile<Scalar>;
  using Scores = typename Tile::Scores;
  static constexpr Index N = simd::kLanes<Scalar>;

 public:
  struct Memory {
    Scalar *keys, *values, *finite_values;  // [keys][D], [keys][Dv]: where they can't be read as they lie
    Scalar* buffer;                         // of ScoreFunction, and [kLanes][features]

    Memory(Scratch& scratch, Index dim, Index value_dim) {
      keys = scratch.take<Scalar>(kBlockSize * dim);
      values = scratch.take<Scalar>(kBlockSize * value_dim);
      finite_values = scratch.take<Scalar>(kBlockSize * value_dim);
      buffer = scratch.take<Scalar>(std::max(ScoreFunction<Scalar>::buffer_size(kBlockSize, LaneTiling<Scalar>::kWidth),
                                             N * std::max(dim, value_dim)));
    }
  };

  FloatForward(const Memory& memory, const Head<Scalar>& head)
      : memory_(memory),
        score_(head.score),
        ahead_(head.ahead),
        queries_(head.of(head.x.q), head.query_positions()),
        keys_(head.of(head.x.k), head.key_positions()),
        values_(head.of(head.x.v)) {}

  /// Calls f<HeadDim>().
  template <int Vectors, class F>
  void with_head_dim(F&& f) const {
    if constexpr (Vectors == kTileVectors) {
      detail::with_head_dim<Scalar>(queries_.cols(), values_.cols(), std::forward<F>(f));
    } else {
      f.template operator()<Eigen::Dynamic>();
    }
  }
  /// Rows of a tile's output.
  Index output_rows() const { return values_.cols(); }

  void load_queries(const Tile& tile, KeyRange rows) const {
    Scalar* const to = tile.query.template as<Scalar>();
    if (rows.end - rows.begin < tile.width()) std::fill_n(to, queries_.cols() * tile.width(), Scalar(0));
    queries_.pack({to, tile.width()}, rows, Times<Scalar>{score_.sign()}, memory_.buffer);
  }
  void load_keys(KeyRange block) {
    load_values(block);
    key_block_ = keys_.rows(block.begin, block.end - block.begin, memory_.keys);
  }
  void load_values(KeyRange block) {
    block_ = block;
    value_block_ = values_.rows(block.begin, block.end - block.begin, memory_.values);
    finite_block_.reset();
  }

  /// S = K·Qᵀ [keys][queries] of a tile and some keys of the block. finish<Borders>(key, v, s) returns what becomes of
  /// the packet s of a key; where a key is not in `inside`, Borders is true.
  template <int Vectors, int HeadDim, class Finish>
  EIGEN_ALWAYS_INLINE void scores(const Tile& tile, const Scores& scores, KeyRange inside, Finish& finish) const {
    const MatrixView<const Scalar> keys = key_block_.middle_rows(scores.keys.begin - block_.begin, scores.key_count());
    const Index dim = HeadDim == Eigen::Dynamic ? keys.cols : HeadDim;
    Scalar* const to = scores.data;  // a copy: stores might change what a reference refers to
    const auto score_keys = [&]<bool Borders>(KeyRange part) __attribute__((always_inline)) {
      for_row_tiles<kTileRows>(
          part.end - part.begin, [&]<int Rows>(Index row) __attribute__((always_inline)) {
            const Index key = part.begin + row;
            ahead_.step();
            RegisterTile<Scalar, Rows, Vectors> score({&keys(key, 0), keys.row_stride, 1},
                                                      {tile.query.template as<Scalar>(), Vectors * N}, dim);
            score.for_each([&](int r, int v, Packet s) __attribute__((always_inline)) {
              simd::store(to + (key + r) * Vectors * N + v * N, finish.template operator()<Borders>(key + r, v, s));
            });
          });
    };
    score_keys.template operator()<false>(inside);
    for (const KeyRange part : {KeyRange{0, inside.begin}, KeyRange{inside.end, scores.key_count()}}) {
      if (!part.empty()) score_keys.template operator()<true>(part);
    }
  }

  /// Scores become weights P. Nothing changes them afterwards if they are final.
  template <int Vectors>
  EIGEN_ALWAYS_INLINE void weights(SoftmaxBlock<Scalar, Vectors>& softmax, const Scores& scores, bool /*final*/) const {
    softmax.weights(scores.data, 0, scores.key_count());
  }

  /// O = decay·O + Vᵀ·P.
  template <int Vectors, int HeadDim>
  EIGEN_DONT_INLINE void add_values(const Tile& tile, const Scores& weights, const Packet (&decay)[Vectors]) const {
    constexpr Index width = Vectors * N;
    const MatrixView<const Scalar> all =
        value_block_.middle_rows(weights.keys.begin - block_.begin, weights.key_count());
    const Index value_dim = HeadDim == Eigen::Dynamic ? all.cols : HeadDim;
    const MatrixView<const Scalar> values = seen_by_all(weights) ? all : only_finite(all, weights);
    for_row_tiles<kTileRows>(
        value_dim, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          ahead_.step();
          RegisterTile<Scalar, Rows, Vectors> weighted({&values(0, d), 1, values.row_stride}, {weights.data, width},
                                                       weights.key_count());
          weighted.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
            Scalar* const o = tile.output + (d + r) * width + v * N;
            simd::store(o, simd::pmadd(simd::load(o), decay[v], x));
          });
        });
    if (values.data != all.data) add_not_finite(tile.output, weights, all);
  }

 private:
  bool seen_by_all(const Scores& scores) const { return !score_.hides_elements() && scores.run.covers(scores.keys); }
  /// Values without what is not finite, if there is any that some query must not see.
  MatrixView<const Scalar> only_finite(MatrixView<const Scalar> values, const Scores& weights) const {
    if (!finite_block_) finite_block_ = rows_are_finite(value_block_);
    if (*finite_block_) return values;
    const KeyRange seen_by_all = score_.hides_elements() ? KeyRange{} : weights.run.inside(weights.keys);
    bool finite = true;
    for (Index j = 0; j < values.rows && finite; ++j) {
      finite = seen_by_all.contains(j) || row_is_finite(&values(j, 0), values.cols);
    }
    if (finite) return values;
    for (Index j = 0; j < values.rows; ++j) {
      for (Index d = 0; d < values.cols; ++d) {
        memory_.finite_values[j * values.cols + d] = is_finite(values(j, d)) ? values(j, d) : Scalar(0);
      }
    }
    return {memory_.finite_values, values.rows, values.cols, values.cols, 1};
  }
  static void add_not_finite(Scalar* output, const Scores& weights, MatrixView<const Scalar> values) {
    for (Index j = 0; j < values.rows; ++j) {
      for (Index d = 0; d < values.cols; ++d) {
        if (is_finite(values(j, d))) continue;
        for (Index l = 0; l < weights.width; ++l) {
          const Scalar weight = weights.row(j)[l];
          if (!is_zero(weight)) output[d * weights.width + l] += weight * values(j, d);
        }
      }
    }
  }

  Memory memory_;
  const ScoreFunction<Scalar>& score_;
  ReadAhead& ahead_;
  RowReader<Scalar> queries_, keys_, values_;
  KeyRange block_;
  MatrixView<const Scalar> key_block_, value_block_;
  mutable std::optional<bool> finite_block_;  // whether all values of the block are, once somebody asked
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
