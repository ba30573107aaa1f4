#pragma once

#include <numbers>

#include "headroom/core/attention/visibility.hpp"
#include "headroom/core/rows.hpp"

/// What happens to a score between the product q·kᵀ and the softmax, and to a weight after it: one small type for each
/// term. A term that changes scores has `apply` for a tile of them. Its derivative is 1 unless `apply` writes slopes,
/// and `add_gradients` adds what a tile of gradients contributes to the gradient of its parameters.
/// A term that hides has `sees_any`, which lets tiles be skipped, and `hide`.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Where the gradients of one head's parameters go: sums of one worker; null, or without data, where not wanted.
struct ParamSums {
  StoredMatrix bias;       // [Lq, keys from first_key on]
  Index first_key;         // key of the first column of `bias`
  double* bias_over_keys;  // [Lq]: of a bias that is broadcast along the keys
  double* relative;        // [2R-1]
  double* slopes;          // [Lq]
  double* sink;            // [1]
  double* score_tables;    // of all tables of a score function, one after the other
  double* polar_phase;     // [D], of all heads that share keys with the first of them

  bool any_of_tiles() const {
    return bias.data != nullptr || bias_over_keys != nullptr || relative != nullptr || slopes != nullptr;
  }
};

/// s becomes cap·tanh(|scale|·s / cap).
template <class Scalar>
struct Softcap {
  double cap, scale;

  explicit operator bool() const { return cap > 0; }
  /// `slope`, where given, receives the derivative with respect to |scale|·s.
  void apply(Scalar* scores, Index count, Scalar* slope) const {
    using Packet = simd::Packet<Scalar>;
    const Packet outer = simd::broadcast(static_cast<Scalar>(cap)),
                 inner = simd::broadcast(static_cast<Scalar>(scale / cap));
    for (Index i = 0; i < count; i += simd::kLanes<Scalar>) {
      const Packet x = simd::tanh<Scalar>(simd::pmul(simd::load(scores + i), inner));
      simd::store(scores + i, simd::pmul(x, outer));
      if (slope != nullptr) simd::store(slope + i, simd::psub(simd::broadcast(Scalar(1)), simd::pmul(x, x)));
    }
  }
};

/// Gradients of what a term makes of scores become those of the scores.
template <class Scalar>
void multiply_by_slope(Scalar* grad, const Scalar* slope, Index count) {
  for (Index i = 0; i < count; i += simd::kLanes<Scalar>) {
    const simd::Packet<Scalar> g = simd::load(grad + i);
    simd::store(grad + i, unless_zero(g, simd::pmul(g, simd::load(slope + i))));
  }
}

/// s becomes factor·s + bias(query,key).
template <class Scalar>
struct Bias {
  const StoredTensor& bias;

  explicit operator bool() const { return static_cast<bool>(bias); }
  /// `buffer` holds [kLanes][rows].
  template <class Tile>
  void apply(const Tile& tile, Scalar factor, Scalar* buffer) const {
    const StoredMatrix part = bias.head(tile.head.b, tile.head.h, bias.shape[1])
                                  .block(tile.run.queries.begin, tile.keys.begin, tile.run.count(), tile.key_count());
    RowReader<Scalar>(Tile::kQueriesInLanes ? part : part.transposed())
        .pack({tile.data, tile.width}, {0, tile.lanes()}, TimesPlus<Scalar>{factor}, buffer);
  }
  /// `buffer` holds [keys].
  template <class Tile>
  void add_gradients(const Tile& grad, const ParamSums& sums, Scalar* buffer) const {
    const Index queries = grad.run.count(), keys = grad.key_count();
    const MatrixView<const Scalar> tile{grad.data, queries, keys, grad.width, 1};
    if (sums.bias.data != nullptr) {
      sums.bias.block(grad.run.queries.begin, grad.keys.begin - sums.first_key, queries, keys).visit([&](auto to) {
        if (to.row_stride != 0) return add_rows(to, tile.data, tile.row_stride);
        std::fill_n(buffer, keys, Scalar(0));
        for (Index i = 0; i < queries; ++i) add_strided(buffer, 1, &tile(i, 0), keys);
        add_strided(to.data, to.col_stride, buffer, keys);
      });
    }
    if (sums.bias_over_keys == nullptr) return;
    for (Index i = 0; i < queries; ++i) {
      double sum = 0;  // terms nearly cancel, so they are added in double
      for (Index l = 0; l < keys; ++l) sum += static_cast<double>(tile(i, l));
      sums.bias_over_keys[grad.run.queries.begin + i] += sum;
    }
  }
};

/// s becomes s + bias(distance).
template <class Scalar>
struct RelativeBias {
  const AttentionParams& params;

  explicit operator bool() const { return static_cast<bool>(params.relative_bias); }
  Index element(Index distance) const {
    const Index reach = params.relative_bias.dim() / 2;  // R - 1
    return std::clamp(distance, -reach, reach) + reach;
  }
  /// Positions of neighbours may belong to different sequences; else the distance grows by 1 from query to query.
  bool irregular() const { return params.query_positions != nullptr; }

  /// A tile holds rows + lanes - 1 different distances: they are looked up once, then every row is a piece of that.
  /// `buffer` holds [rows + lanes - 1].
  template <class Tile>
  void apply(const Tile& tile, Scalar* buffer) const {
    const Index rows = tile.rows(), lanes = tile.lanes();
    const StoredMatrix table = params.relative_bias.head(0, tile.head.h, params.relative_bias.shape[1]);
    table.visit([&](auto bias) {
      if (irregular()) {
        for (Index r = 0; r < rows; ++r) {
          for (Index l = 0; l < lanes; ++l) {
            const Index distance = params.position(tile.query(r, l)) - tile.key(r, l);
            tile.row(r)[l] += static_cast<Scalar>(bias(0, element(distance)));
          }
        }
        return;
      }
      const Index distance = params.position(tile.run.queries.begin) - tile.keys.begin;  // of row 0, lane 0
      const Index sign = Tile::kQueriesInLanes ? 1 : -1;
      for (Index m = 0; m < rows + lanes - 1; ++m) {
        buffer[m] = static_cast<Scalar>(bias(0, element(distance + sign * (m - (rows - 1)))));
      }
      for (Index r = 0; r < rows; ++r) {
        Scalar* const s = tile.row(r);
        for (Index l = 0; l < lanes; ++l) s[l] += buffer[l - r + rows - 1];
      }
    });
  }
  template <Index Capacity>
  void add_gradients(const TileScores<Scalar, Capacity, false>& grad, const ParamSums& sums) const {
    if (sums.relative == nullptr) return;
    const Index queries = grad.run.count(), keys = grad.key_count();
    if (irregular()) {
      for (Index i = 0; i < queries; ++i) {
        const Index distance = params.position(grad.query(i, 0)) - grad.keys.begin;
        for (Index l = 0; l < keys; ++l) {
          sums.relative[element(distance - l)] += static_cast<double>(grad.row(i)[l]);
        }
      }
      return;
    }
    // Sums along a diagonal nearly cancel, so they are taken in double
    double diagonals[Capacity + LaneTiling<Scalar>::kWidth];  // by distance, from the largest one down
    std::fill_n(diagonals, queries + keys - 1, 0.0);
    for (Index i = 0; i < queries; ++i) {
      double* const of_row = diagonals + queries - 1 - i;
      for (Index l = 0; l < keys; ++l) of_row[l] += static_cast<double>(grad.row(i)[l]);
    }
    const Index furthest = params.position(grad.run.queries.end - 1) - grad.keys.begin;
    for (Index m = 0; m < queries + keys - 1; ++m) sums.relative[element(furthest - m)] += diagonals[m];
  }
};

/// s becomes s - slope(query)·|distance|. Distances are differences of whole numbers: positions themselves may be too
/// large for a Scalar.
template <class Scalar>
struct Slopes {
  const AttentionParams& params;

  explicit operator bool() const { return static_cast<bool>(params.slopes); }
  template <Index Capacity, bool QueriesInLanes>
  void apply(const TileScores<Scalar, Capacity, QueriesInLanes>& tile) const {
    const auto& run = tile.run;
    Scalar distance[Capacity];  // to the tile's first key
    const Index queries = QueriesInLanes ? tile.width : tile.rows();
    for (Index i = 0; i < queries; ++i) distance[i] = static_cast<Scalar>(run.position[i] - tile.keys.begin);
    for (Index r = 0; r < tile.rows(); ++r) {
      Scalar* const s = tile.row(r);
      if constexpr (QueriesInLanes) {
        const Scalar key = static_cast<Scalar>(r);
        for (Index l = 0; l < tile.width; ++l) s[l] -= run.slope[l] * std::abs(distance[l] - key);
      } else {
        const Scalar from = distance[r], slope = run.slope[r];
        for (Index l = 0; l < tile.width; ++l) s[l] -= slope * std::abs(from - static_cast<Scalar>(l));
      }
    }
  }
  template <class Tile>
  void add_gradients(const Tile& grad, const ParamSums& sums) const {
    if (sums.slopes == nullptr) return;
    for (Index i = 0; i < grad.run.count(); ++i) {
      double moment = 0;
      const double distance = static_cast<double>(params.position(grad.query(i, 0)) - grad.keys.begin);
      for (Index l = 0; l < grad.key_count(); ++l) {
        moment += static_cast<double>(grad.row(i)[l]) * std::abs(distance - static_cast<double>(l));
      }
      sums.slopes[grad.query(i, 0)] -= moment;
    }
  }
};

/// A score beside those of the keys, without a value.
struct Sink {
  const StoredTensor& sink;

  explicit operator bool() const { return static_cast<bool>(sink); }
  double score(Index h) const { return sink.at(0, h, 0, 0); }
  /// Score of a head's sink in units of log2, if there is one.
  std::optional<double> base2(Index h) const {
    if (!sink) return std::nullopt;
    return score(h) * std::numbers::log2e;
  }
};

/// Hides single (query, key) pairs.
template <class Scalar>
struct ElementMask {
  const AttentionParams& params;

  explicit operator bool() const { return params.mask.data != nullptr; }
  /// Whether it lets any query see any key.
  bool sees_any(HeadIndex head, KeyRange queries, KeyRange keys) const {
    if (!*this) return true;
    for (Index i = queries.begin; i < queries.end; ++i) {
      const bool* row = &params.mask(head.b, head.h, i, 0);
      const Index stride = params.mask.strides[3];
      for (Index j = keys.begin; j < keys.end; ++j) {
        if (row[j * stride] == params.mask_visible) return true;
      }
    }
    return false;
  }
  template <class Tile>
  void hide(const Tile& tile) const {
    const Index rows = tile.rows(), lanes = tile.lanes();
    const bool* const mask = &params.mask(tile.head.b, tile.head.h, tile.run.queries.begin, tile.keys.begin);
    const Index row_stride = params.mask.strides[Tile::kQueriesInLanes ? 3 : 2];
    const Index lane_stride = params.mask.strides[Tile::kQueriesInLanes ? 2 : 3];
    const auto hide = [&](Index r, Index l) {
      Scalar& s = tile.row(r)[l];
      s = mask[r * row_stride + l * lane_stride] == params.mask_visible ? s : kHidden<Scalar>;
    };
    if (lane_stride == 1) {
      for (Index r = 0; r < rows; ++r) {
        for (Index l = 0; l < lanes; ++l) hide(r, l);
      }
    } else {
      for (Index l = 0; l < lanes; ++l) {
        for (Index r = 0; r < rows; ++r) hide(r, l);
      }
    }
  }
};

/// Hides squares of (query, key) pairs.
template <class Scalar>
struct BlockMask {
  const AttentionParams& params;

  explicit operator bool() const { return params.block_mask.data != nullptr; }
  bool sees_any(HeadIndex head, KeyRange queries, KeyRange keys) const {
    if (!*this) return true;
    bool any = false;
    const Index size = params.block_size;
    for (Index i = queries.begin / size; i <= (queries.end - 1) / size && !any; ++i) {
      for (Index j = keys.begin / size; j <= (keys.end - 1) / size; ++j) any |= params.block_mask(head.b, head.h, i, j);
    }
    return any;
  }
  template <class Tile>
  void hide(const Tile& tile) const {
    for (Index r = 0; r < tile.rows(); ++r) {
      for (Index l = 0; l < tile.lanes(); ++l) {
        const Index query = tile.query(r, l) / params.block_size, key = tile.key(r, l) / params.block_size;
        if (!params.block_mask(tile.head.b, tile.head.h, query, key)) tile.row(r)[l] = kHidden<Scalar>;
      }
    }
  }
};

/// Sets weights to 0 after the softmax and multiplies the others by the gain.
template <class Scalar>
struct WeightDropout {
  const AttentionParams& params;
  Index heads;

  explicit operator bool() const { return params.dropout.active(); }
  std::uint32_t row_key(HeadIndex head, Index query) const {
    const Index flat = params.first_head + head.b * heads + head.h;
    return params.dropout.row_key(static_cast<std::uint32_t>(flat), static_cast<std::uint32_t>(query));
  }
  /// Forward: the gain is left to whoever divides by the sum of weights.
  template <Index Capacity>
  void apply(const TileScores<Scalar, Capacity, true>& weights) const {
    const std::uint32_t threshold = params.dropout.threshold();
    std::uint32_t row_keys[Capacity];
    for (Index l = 0; l < weights.width; ++l) row_keys[l] = row_key(weights.head, weights.query(0, l));
    for (Index r = 0; r < weights.rows(); ++r) {
      Scalar* const w = weights.row(r);
      const auto key = static_cast<std::uint32_t>(weights.key(r, 0));
      for (Index l = 0; l < weights.width; ++l) {
        w[l] = Dropout::bits(row_keys[l], key) >= threshold ? w[l] : Scalar(0);
      }
    }
  }
  /// Backward: weights and gradients of the dropped weights become dropped weights and gradients of the scores.
  template <Index Capacity>
  void derivative(const TileScores<Scalar, Capacity, false>& weights, Scalar* grad, const Scalar* delta) const {
    const std::uint32_t threshold = params.dropout.threshold();
    const Scalar gain = static_cast<Scalar>(params.dropout.gain());
    for (Index r = 0; r < weights.rows(); ++r) {
      const std::uint32_t key_of_row = row_key(weights.head, weights.query(r, 0));
      Scalar *const w = weights.row(r), *const g = grad + r * weights.width;
      const Scalar mean = delta[r];
      for (Index l = 0; l < weights.width; ++l) {
        const auto key = static_cast<std::uint32_t>(weights.keys.begin + l);
        const Scalar kept = Dropout::bits(key_of_row, key) >= threshold ? gain : Scalar(0);
        g[l] = w[l] == 0 ? Scalar(0) : w[l] * (kept * g[l] - mean);
        w[l] *= kept;
      }
    }
  }
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
