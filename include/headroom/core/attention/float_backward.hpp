#pragma once

#include <vector>

#include "headroom/core/attention/products.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// A tile of keys in the backward pass.
template <class Scalar>
struct BackwardTile {
  Piece key, value;  // [D][width], [Dv][width], or in VNNI layout; the sign of a negative scale is in the key
  Piece key_rows;    // [width][vector D] of scale·k, or in VNNI layout of k; 0 where k is not finite
  Scalar *grad_key, *grad_value;  // [D][width] without the scale, [Dv][width]
  KeyRange keys;
  int vectors;

  Index width() const { return vectors * Index(simd::kLanes<Scalar>); }
};

/// Some queries of a block: rows from `skip` on.
struct BlockPart {
  Index skip, rows;
};

/// The workspace of a backward worker; what a Piece holds is up to the policy of its products.
template <class Scalar>
struct BackwardMemory {
  static constexpr Index N = simd::kLanes<Scalar>, kWidth = LaneTiling<Scalar>::kWidth;
  static constexpr Index kPaddedWidth = padded(kWidth, kVnniDepth);

  Index dim, value_dim, vector_dim;  // vector_dim: D in whole vectors
  Scratch scratch;
  Piece weights, grad_scores;  // P and dS: [queries][width], in the end in VNNI layout
  ScoreMemory<Scalar> scores;  // its buffer and what is behind also hold [3][kLanes][features]
  Piece grad_queries;          // sums for grad_q: [queries][vector D]
  Piece queries, grads;        // of a block
  BackwardTile<Scalar> tiles[Strips<Scalar>::kMostTiles];

  BackwardMemory(std::byte* workspace, Index d, Index dv, const AttentionParams& params)
      : dim(d),
        value_dim(dv),
        vector_dim(padded(d, N)),
        scratch(workspace),
        scores(scratch, params, kBlockSize * kWidth,
               std::max(ScoreFunction<Scalar>::buffer_size(kBlockSize, kWidth), N * std::max(d, dv)),
               std::max(2 * N * std::max(d, dv), kMayUseBfloat16<Scalar> ? kBlockSize * kPaddedWidth / 2 : 0)) {
    const Index of_key = padded_dim<Scalar>(d), of_value = padded_dim<Scalar>(dv);
    weights = scratch.take_piece<Scalar>(kBlockSize * kWidth);
    grad_scores = scratch.take_piece<Scalar>(kBlockSize * kWidth);
    grad_queries = scratch.take_piece<Scalar>(kBlockSize * std::max(vector_dim, std::max(of_key, of_value) / 2));
    queries = scratch.take_piece<Scalar>(kBlockSize * of_key);
    grads = scratch.take_piece<Scalar>(kBlockSize * of_value);
    for (Index t = 0; t < Strips<Scalar>::most_tiles(d + dv); ++t) {
      tiles[t].key = scratch.take_piece<Scalar>(of_key * kWidth);
      tiles[t].value = scratch.take_piece<Scalar>(of_value * kWidth);
      tiles[t].grad_key = scratch.take<Scalar>(of_key * kWidth);
      tiles[t].grad_value = scratch.take<Scalar>(of_value * kWidth);
      tiles[t].key_rows = scratch.take_piece<Scalar>(kWidth * vector_dim);
    }
  }
  /// dS rounded to bfloat16 [queries][padded width], once a tile was differentiated.
  Eigen::bfloat16* grad_score_rows() const { return scores.behind.template as<Eigen::bfloat16>(); }
  static Index bytes(Index dim, Index value_dim, const AttentionParams& params) {
    return BackwardMemory(nullptr, dim, value_dim, params).scratch.bytes();
  }
};

/// Products of the backward pass in float or double: keys in lanes, queries and output gradients read where they lie.
template <class Scalar>
class FloatBackward {
  using Packet = simd::Packet<Scalar>;
  using Tile = BackwardTile<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

 public:
  /// A tile takes part with those queries that see any of its keys.
  static constexpr bool kWholeBlocks = false;

  FloatBackward(const BackwardMemory<Scalar>& memory, const Head<Scalar>& head)
      : memory_(memory),
        score_(head.score),
        ahead_(head.ahead),
        keys_(head.of(head.x.k), head.key_positions()),
        values_(head.of(head.x.v)) {}

  /// Key lanes of a tile, of those keys that are `read`: others may hold anything.
  void load_key_lanes(const Piece& to, const Tile& tile, KeyRange read) const {
    load_lanes(to, tile, keys_, read, score_.sign());
  }
  void load_tile(const Tile& tile, KeyRange read) const {
    Scalar* const rows = tile.key_rows.template as<Scalar>();
    std::fill_n(tile.grad_key, memory_.dim * tile.width(), Scalar(0));
    std::fill_n(tile.grad_value, memory_.value_dim * tile.width(), Scalar(0));
    std::fill_n(rows, tile.width() * memory_.vector_dim, Scalar(0));
    load_lanes(tile.value, tile, values_, read, Scalar(1));
    Scalar* const lanes = tile.key.template as<Scalar>();
    clear_unread(lanes, keys_.cols(), tile, read);
    const Scalar scale = static_cast<Scalar>(score_.scale());
    const Index count = read.end - read.begin;
    for (Index next = 0; next < count; next += N) {  // positions are made for lanes and rows together
      const Index first = read.begin + whole_vector(next, count, N);
      const auto keys = keys_.rows(first, std::min(N, read.end - first), memory_.scores.buffer);
      pack_lanes(lanes + (first - tile.keys.begin), tile.width(), keys, Times<Scalar>{score_.sign()});
      for (Index j = 0; j < keys.rows; ++j) {
        const Scalar* const row = &keys(j, 0);
        Scalar* const scaled = rows + (first + j - tile.keys.begin) * memory_.vector_dim;
        // A key that is not finite makes NaN of the gradients of all scores it is seen in; 0·NaN would do so elsewhere.
        for (Index d = 0; d < memory_.dim; ++d) scaled[d] = is_finite(row[d]) ? scale * row[d] : Scalar(0);
      }
    }
  }

  void use_head(const Head<Scalar>& head, const StoredMatrix& grad_output) {
    queries_ = RowReader<Scalar>(head.of(head.x.q), head.query_positions());
    grads_ = RowReader<Scalar>(grad_output);
  }
  void load_queries(KeyRange block) {
    q_ = queries_.rows(block.begin, block.end - block.begin, memory_.queries.template as<Scalar>());
  }
  /// Queries and output gradients. Where some query does not see every key, what is not finite in its rows is taken out
  /// of the sums over queries, and add_not_finite() adds it for the keys that it does see. The copy is made only then.
  void load_block(KeyRange block, bool hides) {
    load_queries(block);
    g_ = grads_.rows(block.begin, block.end - block.begin, memory_.grads.template as<Scalar>());
    spoiled_ = hides && !(rows_are_finite(q_) && rows_are_finite(g_));
    finite_q_ = q_, finite_g_ = g_;
    if (spoiled_) take_out_not_finite();
  }

  /// S = Q·Kᵀ [queries][keys].
  template <int Vectors>
  EIGEN_ALWAYS_INLINE void scores(Scalar* scores, const Piece& key_lanes, BlockPart part) const {
    multiply_by_lanes<Vectors>(
        q_.middle_rows(part.skip, part.rows), key_lanes, scores,
        [](Index, int, Packet s) __attribute__((always_inline)) { return s; });
  }
  /// dP = G·Vᵀ [queries][keys]; finish(row, v, dp) returns what is stored.
  template <int Vectors, class Finish>
  EIGEN_ALWAYS_INLINE void grad_weights(const Tile& tile, BlockPart part, Finish&& finish) const {
    multiply_by_lanes<Vectors>(g_.middle_rows(part.skip, part.rows), tile.value,
                               memory_.grad_scores.template as<Scalar>(), finish);
  }

  /// dV += Gᵀ·P, dK += Qᵀ·dS, dQ += dS·K; forward did: S = Q·Kᵀ, O = P·V.
  template <int Vectors>
  EIGEN_DONT_INLINE void accumulate(const Tile& tile, BlockPart part) const {
    constexpr Index width = Vectors * N;
    const Scalar* const grad_scores = memory_.grad_scores.template as<Scalar>();
    add_transposed<Vectors>(tile.grad_value, finite_g_.middle_rows(part.skip, part.rows),
                            memory_.weights.template as<Scalar>());
    add_transposed<Vectors>(tile.grad_key, finite_q_.middle_rows(part.skip, part.rows), grad_scores);
    const Index dim = memory_.vector_dim;
    Scalar* const grad_queries = memory_.grad_queries.template as<Scalar>() + part.skip * dim;
    const Scalar* const key_rows = tile.key_rows.template as<Scalar>();
    for_row_tiles<kTileVectors>(
        dim / N, [&]<int V>(Index vector) __attribute__((always_inline)) {
          for_row_tiles<kTileRows>(
              part.rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
                ahead_.step();
                RegisterTile<Scalar, Rows, V> grad({grad_scores + row * width, width, 1}, {key_rows + vector * N, dim},
                                                   width);
                grad.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
                  Scalar* const to = grad_queries + (row + r) * dim + (vector + v) * N;
                  simd::store(to, simd::padd(simd::load(to), x));
                });
              });
        });
  }
  /// The scale is in the rows of keys already.
  void finish_grad_queries(Index) const {}

  bool spoiled() const { return spoiled_; }
  Scalar query(Index i, Index d) const { return q_(i, d); }
  Scalar grad(Index i, Index d) const { return g_(i, d); }

 private:
  void load_lanes(const Piece& piece, const Tile& tile, const RowReader<Scalar>& from, KeyRange read,
                  Scalar factor) const {
    Scalar* const to = piece.template as<Scalar>();
    clear_unread(to, from.cols(), tile, read);
    if (read.empty()) return;
    from.pack({to + (read.begin - tile.keys.begin), tile.width()}, read, Times<Scalar>{factor}, memory_.scores.buffer);
  }
  /// Lanes [cols][width] of a tile of which some are not read.
  static void clear_unread(Scalar* lanes, Index cols, const Tile& tile, KeyRange read) {
    if (read.empty() || read.end - read.begin < tile.width()) std::fill_n(lanes, cols * tile.width(), Scalar(0));
  }
  /// to [rows][lanes] = a·lanes
  template <int Vectors, class Finish>
  EIGEN_ALWAYS_INLINE void multiply_by_lanes(MatrixView<const Scalar> a, const Piece& lanes, Scalar* to,
                                             Finish&& finish) const {
    for_row_tiles<kTileRows>(
        a.rows, [&]<int Rows>(Index row) __attribute__((always_inline)) {
          ahead_.step();
          RegisterTile<Scalar, Rows, Vectors> product({&a(row, 0), a.row_stride, 1},
                                                      {lanes.template as<Scalar>(), Vectors * N}, a.cols);
          product.for_each([&](int r, int v, Packet x) __attribute__((always_inline)) {
            simd::store(to + (row + r) * Vectors * N + v * N, finish(row + r, v, x));
          });
        });
  }
  /// to[d][lane] += sum_i x(i,d)·s[i][lane]
  template <int Vectors>
  EIGEN_ALWAYS_INLINE void add_transposed(Scalar* to, MatrixView<const Scalar> x, const Scalar* s) const {
    constexpr Index width = Vectors * N;
    for_row_tiles<kTileRows>(
        x.cols, [&]<int Rows>(Index d) __attribute__((always_inline)) {
          ahead_.step();
          RegisterTile<Scalar, Rows, Vectors> sum({&x(0, d), 1, x.row_stride}, {s, width}, x.rows);
          sum.for_each([&](int r, int v, Packet y) __attribute__((always_inline)) {
            Scalar* const at = to + (d + r) * width + v * N;
            simd::store(at, simd::padd(simd::load(at), y));
          });
        });
  }
  void take_out_not_finite() {
    finite_rows_.resize(static_cast<std::size_t>(q_.rows * (q_.cols + g_.cols)));
    Scalar* to = finite_rows_.data();
    for (MatrixView<const Scalar>* x : {&finite_q_, &finite_g_}) {
      const MatrixView<const Scalar> copy{to, x->rows, x->cols, x->cols, 1};
      for (Index i = 0; i < x->rows; ++i) {
        for (Index d = 0; d < x->cols; ++d) *to++ = is_finite((*x)(i, d)) ? (*x)(i, d) : Scalar(0);
      }
      *x = copy;
    }
  }

  const BackwardMemory<Scalar>& memory_;
  const ScoreFunction<Scalar>& score_;
  ReadAhead& ahead_;
  RowReader<Scalar> keys_, values_, queries_{StoredMatrix{}}, grads_{StoredMatrix{}};
  MatrixView<const Scalar> q_, g_;                // of the block
  MatrixView<const Scalar> finite_q_, finite_g_;  // what the sums over queries take
  bool spoiled_ = false;                          // whether these are not the same
  std::vector<Scalar> finite_rows_;               // the latter, then
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
