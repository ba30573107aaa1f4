#pragma once

#include "headroom/core/rows.hpp"

namespace headroom::inline v0::core::detail {

/// What an invisible score is set to: below every finite score that is seen, because those of the same value are lifted
/// to kLeast, the next number above it. Numbers of this size are so far apart that any weight relative to a visible
/// maximum is exactly 0, and no infinity is needed, so it works under -ffast-math.
template <class Scalar>
inline constexpr Scalar kHidden = std::numeric_limits<Scalar>::lowest();
template <class Scalar>
inline constexpr Scalar kLeast = kHidden<Scalar>*(1 - std::numeric_limits<Scalar>::epsilon() / 2);

/// Where the largest score of a row, in units of log2, is further from 0 than this, its log-sum-exp in double is too
/// coarse to normalise weights, and how it splits into two numbers too.
template <class Scalar>
inline constexpr double kApart = std::is_same_v<Scalar, double> ? 1024 : 16384;

/// A run of queries of one head: which keys each one sees, where it stands, and its slope.
template <class Scalar, Index Capacity>
struct QueryRun {
  alignas(64) Scalar first[Capacity];
  alignas(64) Scalar last[Capacity];  // one past the last key
  alignas(64) Scalar slope[Capacity];
  Index position[Capacity];
  KeyRange queries;
  KeyRange any;  // no key outside is seen by any query
  KeyRange all;  // every key inside is seen by every query

  QueryRun() = default;
  /// Places past the last query repeat it.
  QueryRun(const MaskRef& mask, const AttentionParams& params, Index b, Index h, KeyRange run, Index keys)
      : queries(run) {
    const Index count = run.end - run.begin;
    Index begin[Capacity], end[Capacity];
    mask.ranges(b, h, run, keys, begin, end);
    std::copy_n(begin, count, first);
    std::copy_n(end, count, last);
    summarise(keys);
    std::fill(first + count, first + Capacity, first[count - 1]);
    std::fill(last + count, last + Capacity, last[count - 1]);
    if (!params.slopes) return;
    for (Index i = 0; i < Capacity; ++i) {
      const Index query = run.begin + std::min(i, count - 1);
      position[i] = params.position(query);
      slope[i] = static_cast<Scalar>(params.slopes.at(b, h, query, 0));
    }
  }
  /// From the first to the last query that sees any of `keys`.
  KeyRange that_see(KeyRange keys) const {
    const auto sees = [&](Index query) {
      const Index i = query - queries.begin;
      return std::max<Index>(first[i], keys.begin) < std::min<Index>(last[i], keys.end);
    };
    KeyRange part = queries;
    while (part.begin < part.end && !sees(part.begin)) ++part.begin;
    while (part.begin < part.end && !sees(part.end - 1)) --part.end;
    return part;
  }
  /// The run of some of these queries.
  QueryRun part(KeyRange part) const {
    const Index skip = part.begin - queries.begin, count = part.end - part.begin;
    QueryRun run;
    run.queries = part;
    std::copy_n(first + skip, count, run.first);
    std::copy_n(last + skip, count, run.last);
    std::copy_n(position + skip, count, run.position);
    std::copy_n(slope + skip, count, run.slope);
    run.summarise(any.end);
    return run;
  }
  /// Places within `keys` that every query sees.
  KeyRange inside(KeyRange keys) const {
    const Index length = keys.end - keys.begin, begin = std::clamp<Index>(all.begin - keys.begin, 0, length);
    return {begin, std::clamp<Index>(all.end - keys.begin, begin, length)};
  }
  /// Scores of `key` for the queries from `place` on, hidden where a query does not see it.
  EIGEN_ALWAYS_INLINE simd::Packet<Scalar> hide_outside(Index key, Index place, simd::Packet<Scalar> scores) const {
    const auto position = simd::broadcast(static_cast<Scalar>(key));
    const auto seen = simd::pand(simd::pcmp_le(simd::load(first + place), position),
                                 simd::pcmp_lt(position, simd::load(last + place)));
    return simd::pselect(seen, scores, simd::broadcast(kHidden<Scalar>));
  }
  bool touches(KeyRange keys) const { return !(any & keys).empty(); }
  bool covers(KeyRange keys) const { return all.contains(keys); }

 private:
  void summarise(Index keys) {
    using Places = Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>>;
    const Index count = queries.end - queries.begin;
    any = hull(first, last, count, keys);
    all = {static_cast<Index>(Places(first, count).maxCoeff()), static_cast<Index>(Places(last, count).minCoeff())};
  }
};

/// A tile of scores [rows][width] of head (b,h). In the forward pass queries fill the lanes and rows are keys, in the
/// backward pass it is the other way round.
template <class Scalar>
struct ScoreTile {
  Scalar* scores;
  Index width;
  Index b, h;
  KeyRange keys;
};

/// Turns products q·kᵀ into scores, and gradients of scores into gradients of what was added to them.
template <class Scalar>
class ScoreRules {
 public:
  ScoreRules(const AttentionParams& params, const MaskRef& mask, const AttentionTensors& x)
      : params_(params), mask_(mask), heads_(x.heads()), scale_(params.scale_for(x.q.dim())) {
    const bool changes = params.softcap > 0 || params.bias || params.relative_bias || params.slopes ||
                         params.mask.data != nullptr || params.block_mask.data != nullptr;
    // What lies between kHidden and kLeast, times a factor of nearly zero, would not be far
    scaled_ = changes || std::abs(scale_) < 1e-28;
  }

  const AttentionParams& params() const { return params_; }
  const MaskRef& mask() const { return mask_; }
  double scale() const { return scale_; }
  /// The sign of the scale goes into the operand that fills the lanes, which is exact.
  Scalar sign() const { return scale_ < 0 ? Scalar(-1) : Scalar(1); }
  /// Whether every tile has to go through apply(), which multiplies by |scale|. Else scores stay the plain products,
  /// bit for bit the same in both passes, and only tiles that a range's border crosses go through it.
  bool scaled() const { return scaled_; }
  /// The weight of a score s is 2^(factor·s), up to normalisation.
  Scalar factor() const { return static_cast<Scalar>(exact_factor()); }
  /// The same before it was rounded.
  double exact_factor() const { return score_scale() * std::numbers::log2e; }
  /// What the scores of a tile still have to be multiplied by.
  double score_scale() const { return scaled_ ? 1.0 : std::abs(scale_); }
  bool hides_elements() const { return params_.mask.data != nullptr || params_.block_mask.data != nullptr; }

  /// Whether the mask or the block mask lets any query see any key.
  bool sees_any(Index b, Index h, KeyRange queries, KeyRange keys) const {
    if (params_.block_mask.data != nullptr) {
      bool any = false;
      const Index size = params_.block_size;
      for (Index i = queries.begin / size; i <= (queries.end - 1) / size && !any; ++i) {
        for (Index j = keys.begin / size; j <= (keys.end - 1) / size; ++j) any |= params_.block_mask(b, h, i, j);
      }
      if (!any) return false;
    }
    if (params_.mask.data != nullptr) {
      for (Index i = queries.begin; i < queries.end; ++i) {
        const bool* row = &params_.mask(b, h, i, 0);
        const Index stride = params_.mask.strides[3];
        for (Index j = keys.begin; j < keys.end; ++j) {
          if (row[j * stride] == params_.mask_visible) return true;
        }
      }
      return false;
    }
    return true;
  }

  /// Asks for the bias of one key and all queries of a tile, to be there when apply() needs it.
  template <Index Capacity>
  EIGEN_ALWAYS_INLINE void prefetch(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run,
                                    Index key) const {
    if (params_.bias) prefetch_bias(tile, run.queries, tile.keys.begin + key);
  }

  /// Scales, caps, adds and hides. `cap_slope` [rows][width], where given, receives the derivative of the softcap.
  /// `buffer` holds [kLanes][rows] and what the relative bias of a tile needs.
  template <bool QueriesInLanes, Index Capacity>
  void apply(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Scalar* cap_slope,
             Scalar* buffer) const {
    const Index queries = run.queries.end - run.queries.begin, keys = tile.keys.end - tile.keys.begin;
    const Index rows = QueriesInLanes ? keys : queries, lanes = QueriesInLanes ? queries : keys;
    Scalar factor = scaled_ ? static_cast<Scalar>(std::abs(scale_)) : Scalar(1);
    if (params_.softcap > 0) {
      cap(tile.scores, rows * tile.width, cap_slope);
      factor = 1;
    }
    if (params_.bias) {
      const StoredMatrix bias = params_.bias.head(tile.b, tile.h, params_.bias.shape[1])
                                    .block(run.queries.begin, tile.keys.begin, queries, keys);
      RowReader<Scalar>(QueriesInLanes ? bias : bias.transposed())
          .pack(tile.scores, tile.width, 0, 0, lanes, TimesPlus<Scalar>{factor}, buffer);
    } else if (factor != 1) {
      for (Index i = 0; i < rows * tile.width; ++i) tile.scores[i] *= factor;
    }
    if (params_.relative_bias) add_relative<QueriesInLanes>(tile, run, rows, lanes, buffer);
    if (params_.slopes) add_slopes<QueriesInLanes>(tile, run, rows);
    if (params_.bias || params_.relative_bias || params_.slopes) lift(tile.scores, rows * tile.width);
    hide_outside<QueriesInLanes>(tile, run, rows);
    if (params_.mask.data != nullptr) hide_masked<QueriesInLanes>(tile, run, rows, lanes);
    if (params_.block_mask.data != nullptr) hide_blocks<QueriesInLanes>(tile, run, rows, lanes);
  }
  static Index buffer_size(Index rows, Index width) {
    return std::max<Index>(simd::kLanes<Scalar> * rows, rows + width);
  }

  /// Forward: sets the weights [keys][queries] that are dropped to 0.
  template <Index Capacity>
  void drop(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run) const {
    const Dropout dropout = params_.dropout;
    const std::uint32_t threshold = dropout.threshold();
    std::uint32_t row_key[Capacity];
    for (Index l = 0; l < tile.width; ++l) row_key[l] = this->row_key(tile, run.queries.begin + l);
    for (Index key = tile.keys.begin; key < tile.keys.end; ++key) {
      Scalar* const w = tile.scores + (key - tile.keys.begin) * tile.width;
      for (Index l = 0; l < tile.width; ++l) {
        w[l] = Dropout::bits(row_key[l], static_cast<std::uint32_t>(key)) >= threshold ? w[l] : Scalar(0);
      }
    }
  }
  /// Backward: weights [queries][keys] and gradients of the dropped weights become dropped weights and gradients of
  /// the scores.
  void drop_backward(const ScoreTile<Scalar>& tile, KeyRange queries, Scalar* grad, const Scalar* delta) const {
    const Dropout dropout = params_.dropout;
    const std::uint32_t threshold = dropout.threshold();
    const Scalar gain = static_cast<Scalar>(dropout.gain());
    for (Index i = queries.begin; i < queries.end; ++i) {
      const std::uint32_t key_of_row = row_key(tile, i);
      Scalar *const w = tile.scores + (i - queries.begin) * tile.width, *const g =
                                                                            grad + (i - queries.begin) * tile.width;
      const Scalar mean = delta[i - queries.begin];
      for (Index l = 0; l < tile.width; ++l) {
        const auto key = static_cast<std::uint32_t>(tile.keys.begin + l);
        const Scalar kept = Dropout::bits(key_of_row, key) >= threshold ? gain : Scalar(0);
        g[l] = w[l] == 0 ? Scalar(0) : w[l] * (kept * g[l] - mean);
        w[l] *= kept;
      }
    }
  }

  /// Adds the gradients of scores [queries][keys] of a tile to those of bias, relative bias and slopes. `bias` holds
  /// all queries of the head, and the tile's keys from column `first_key` on. `rows`, `relative` and `slopes` are sums
  /// of one head and worker, for parts that several tiles add to: over the keys for a bias that is broadcast along them
  /// [Lq], by distance [2R-1], by query [Lq].
  template <Index Capacity>
  void add_gradients(const ScoreTile<Scalar>& grad, const QueryRun<Scalar, Capacity>& run, const StoredMatrix& bias,
                     Index first_key, double* rows, double* relative, double* slopes, Scalar* buffer) const {
    const Index queries = run.queries.end - run.queries.begin, keys = grad.keys.end - grad.keys.begin;
    if (bias.data != nullptr) {
      const MatrixView<const Scalar> tile{grad.scores, queries, keys, grad.width, 1};
      bias.block(run.queries.begin, first_key, queries, keys).visit([&](auto to) {
        if (to.row_stride != 0) return add_rows(to, tile.data, tile.row_stride);
        std::fill_n(buffer, keys, Scalar(0));
        for (Index i = 0; i < queries; ++i) add_strided(buffer, 1, &tile(i, 0), keys);
        add_strided(to.data, to.col_stride, buffer, keys);
      });
    }
    if (rows == nullptr && slopes == nullptr && relative == nullptr) return;
    // Sums along a row of gradients nearly cancel, so they are taken in double.
    double diagonals[Capacity + LaneTiling<Scalar>::kWidth];  // by distance, from the largest one down
    const Index distances = queries + keys - 1;
    if (relative != nullptr) std::fill_n(diagonals, distances, 0.0);
    for (Index i = 0; i < queries; ++i) {
      const Scalar* const g = grad.scores + i * grad.width;
      const Index query = run.queries.begin + i;
      if (rows != nullptr || slopes != nullptr) {
        double sum = 0, moment = 0;
        const double distance = static_cast<double>(params_.position(query) - grad.keys.begin);
        for (Index l = 0; l < keys; ++l) {
          sum += static_cast<double>(g[l]);
          moment += static_cast<double>(g[l]) * std::abs(distance - static_cast<double>(l));
        }
        if (rows != nullptr) rows[query] += sum;
        if (slopes != nullptr) slopes[query] -= moment;
      }
      if (relative == nullptr) continue;
      if (params_.query_positions != nullptr) {  // neighbours may belong to different sequences
        const Index distance = params_.position(query) - grad.keys.begin;
        for (Index l = 0; l < keys; ++l) relative[relative_index(distance - l)] += static_cast<double>(g[l]);
      } else {
        double* const of_row = diagonals + queries - 1 - i;
        for (Index l = 0; l < keys; ++l) of_row[l] += static_cast<double>(g[l]);
      }
    }
    if (relative != nullptr && params_.query_positions == nullptr) {
      const Index furthest = params_.position(run.queries.end - 1) - grad.keys.begin;
      for (Index m = 0; m < distances; ++m) relative[relative_index(furthest - m)] += diagonals[m];
    }
  }

  /// How far the score of a head's sink is above a score from the softmax, in units of log2: a difference of scores,
  /// because a product with log2(e) would be rounded by more than what is left where both are large.
  double sink_above(Index h, double score) const {
    return (params_.sink.at(0, h, 0, 0) - score * score_scale()) * std::numbers::log2e;
  }
  /// Score of the sink of a head in units of log2, if there is one.
  std::optional<double> sink(Index h) const {
    if (!params_.sink) return std::nullopt;
    return params_.sink.at(0, h, 0, 0) * std::numbers::log2e;
  }

 private:
  using Packet = simd::Packet<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

  std::uint32_t row_key(const ScoreTile<Scalar>& tile, Index query) const {
    const Index head = params_.first_head + tile.b * heads_ + tile.h;
    return params_.dropout.row_key(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(query));
  }
  Index relative_index(Index distance) const {
    const Index reach = params_.relative_bias.dim() / 2;  // R - 1
    return std::clamp(distance, -reach, reach) + reach;
  }
  void prefetch_bias(const ScoreTile<Scalar>& tile, KeyRange queries, Index key) const {
    params_.bias.head(tile.b, tile.h, params_.bias.shape[1]).visit([&](auto bias) {
      for (Index i = queries.begin; i < queries.end; ++i) __builtin_prefetch(&bias(i, key));
    });
  }

  void cap(Scalar* scores, Index count, Scalar* cap_slope) const {
    const Packet outer = simd::broadcast(static_cast<Scalar>(params_.softcap)),
                 inner = simd::broadcast(static_cast<Scalar>(std::abs(scale_) / params_.softcap));
    for (Index i = 0; i < count; i += N) {
      const Packet x = simd::tanh<Scalar>(simd::pmul(simd::load(scores + i), inner));
      simd::store(scores + i, simd::pmul(x, outer));
      if (cap_slope != nullptr) {
        simd::store(cap_slope + i, simd::psub(simd::broadcast(Scalar(1)), simd::pmul(x, x)));
      }
    }
  }

  /// A tile holds rows + lanes - 1 different distances: they are looked up once, then every row is a piece of that.
  template <bool QueriesInLanes, Index Capacity>
  void add_relative(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Index rows, Index lanes,
                    Scalar* buffer) const {
    const StoredMatrix table = params_.relative_bias.head(0, tile.h, params_.relative_bias.shape[1]);
    table.visit([&](auto bias) {
      if (params_.query_positions != nullptr) {  // neighbours may belong to different sequences
        for (Index r = 0; r < rows; ++r) {
          for (Index l = 0; l < lanes; ++l) {
            const Index query = run.queries.begin + (QueriesInLanes ? l : r);
            const Index key = tile.keys.begin + (QueriesInLanes ? r : l);
            tile.scores[r * tile.width + l] +=
                static_cast<Scalar>(bias(0, relative_index(params_.position(query) - key)));
          }
        }
        return;
      }
      const Index distance = params_.position(run.queries.begin) - tile.keys.begin;  // of row 0, lane 0
      const Index sign = QueriesInLanes ? 1 : -1;
      for (Index m = 0; m < rows + lanes - 1; ++m) {
        buffer[m] = static_cast<Scalar>(bias(0, relative_index(distance + sign * (m - (rows - 1)))));
      }
      for (Index r = 0; r < rows; ++r) {
        Scalar* const s = tile.scores + r * tile.width;
        for (Index l = 0; l < lanes; ++l) s[l] += buffer[l - r + rows - 1];
      }
    });
  }

  /// Distances are differences of whole numbers: positions themselves may be too large for a Scalar.
  template <bool QueriesInLanes, Index Capacity>
  static void add_slopes(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Index rows) {
    Scalar distance[Capacity];  // to the tile's first key
    const Index queries = QueriesInLanes ? tile.width : rows;
    for (Index i = 0; i < queries; ++i) distance[i] = static_cast<Scalar>(run.position[i] - tile.keys.begin);
    for (Index r = 0; r < rows; ++r) {
      Scalar* const s = tile.scores + r * tile.width;
      if constexpr (QueriesInLanes) {
        const Scalar key = static_cast<Scalar>(r);
        for (Index l = 0; l < tile.width; ++l) s[l] -= run.slope[l] * std::abs(distance[l] - key);
      } else {
        const Scalar from = distance[r], slope = run.slope[r];
        for (Index l = 0; l < tile.width; ++l) s[l] -= slope * std::abs(from - static_cast<Scalar>(l));
      }
    }
  }

  /// Scores that are seen are above kHidden, as far as they are finite.
  static void lift(Scalar* scores, Index count) {
    const Packet hidden = simd::broadcast(kHidden<Scalar>), least = simd::broadcast(kLeast<Scalar>);
    for (Index i = 0; i < count; i += N) {
      const Packet s = simd::load(scores + i);
      simd::store(scores + i, simd::pselect(simd::pcmp_eq(s, hidden), least, s));
    }
  }

  template <bool QueriesInLanes, Index Capacity>
  void hide_outside(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Index rows) const {
    if (run.covers({tile.keys.begin, tile.keys.begin + (QueriesInLanes ? rows : tile.width)})) return;
    const KeyRange inside = run.inside(tile.keys);
    for (Index r = 0; r < rows; ++r) {
      Scalar* const s = tile.scores + r * tile.width;
      if constexpr (QueriesInLanes) {
        if (inside.contains(r)) continue;
        for (Index l = 0; l < tile.width; l += N) {
          simd::store(s + l, run.hide_outside(tile.keys.begin + r, l, simd::load(s + l)));
        }
      } else {
        const auto lane = [&](Scalar key) {
          return std::clamp<Index>(static_cast<Index>(key) - tile.keys.begin, 0, tile.width);
        };
        std::fill(s, s + lane(run.first[r]), kHidden<Scalar>);
        std::fill(s + lane(run.last[r]), s + tile.width, kHidden<Scalar>);
      }
    }
  }

  template <bool QueriesInLanes, Index Capacity>
  void hide_masked(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Index rows,
                   Index lanes) const {
    const bool* const mask = &params_.mask(tile.b, tile.h, run.queries.begin, tile.keys.begin);
    const Index row_stride = params_.mask.strides[QueriesInLanes ? 3 : 2];
    const Index lane_stride = params_.mask.strides[QueriesInLanes ? 2 : 3];
    const auto hide = [&](Index r, Index l) {
      Scalar& s = tile.scores[r * tile.width + l];
      s = mask[r * row_stride + l * lane_stride] == params_.mask_visible ? s : kHidden<Scalar>;
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

  template <bool QueriesInLanes, Index Capacity>
  void hide_blocks(const ScoreTile<Scalar>& tile, const QueryRun<Scalar, Capacity>& run, Index rows,
                   Index lanes) const {
    for (Index r = 0; r < rows; ++r) {
      for (Index l = 0; l < lanes; ++l) {
        const Index query = run.queries.begin + (QueriesInLanes ? l : r),
                    key = tile.keys.begin + (QueriesInLanes ? r : l);
        if (!params_.block_mask(tile.b, tile.h, query / params_.block_size, key / params_.block_size)) {
          tile.scores[r * tile.width + l] = kHidden<Scalar>;
        }
      }
    }
  }

  const AttentionParams& params_;
  MaskRef mask_;
  Index heads_;
  double scale_;
  bool scaled_;
};

}  // namespace headroom::inline v0::core::detail
