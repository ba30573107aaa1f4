#pragma once

#include "headroom/core/attention/scores.hpp"
#include "headroom/core/finite.hpp"

/// Softmax over keys that come one block at a time (Milakov & Gimelshein 2018): the weights of a query are kept
/// relative to its largest score so far, and what was summed with them shrinks when that maximum rises.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Where the largest score of a row, in units of log2, is further from 0 than this, its log-sum-exp in double is too
/// coarse to normalise weights, and how it splits into two numbers too.
template <class Scalar>
inline constexpr double kApart = std::is_same_v<Scalar, double> ? 1024 : 16384;

/// What a tile of queries keeps from block to block, a lane for each query.
template <class Scalar>
struct SoftmaxState {
  Scalar* maximum;  // largest score so far
  Scalar* sum;      // of the weights relative to it

  void begin(Index width) const {
    std::fill_n(sum, width, Scalar(0));
    std::fill_n(maximum, width, kLeast<Scalar>);  // above every hidden score, below no other
  }
};

/// Adds one block of keys to the softmax of a tile of `Vectors` registers of queries: the maximum rises over all scores
/// of the block, then scores become weights, then the sums follow.
template <class Scalar, int Vectors>
struct SoftmaxBlock {
  using Packet = simd::Packet<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>, kWidth = Vectors * N;

  Packet factor, before[Vectors], maximum[Vectors], sum[Vectors];
  Packet decay[Vectors];  // what is summed up so far has to be multiplied by

  EIGEN_ALWAYS_INLINE SoftmaxBlock(const SoftmaxState<Scalar>& state, Scalar log2_factor)
      : factor(simd::broadcast(log2_factor)) {
    for (int v = 0; v < Vectors; ++v) before[v] = maximum[v] = simd::load(state.maximum + v * N);
  }
  EIGEN_ALWAYS_INLINE void raise(int v, Packet score) { maximum[v] = simd::pmax(score, maximum[v]); }
  /// Raises the maximum by scores [keys][queries] alone, forgetting those that this block was raised by before.
  EIGEN_ALWAYS_INLINE void raise_anew(const Scalar* scores, Index keys) {
    for (int v = 0; v < Vectors; ++v) maximum[v] = before[v];
    for (Index key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) raise(v, simd::load(scores + key * kWidth + v * N));
    }
  }
  /// The maximum is final.
  EIGEN_ALWAYS_INLINE void fix_maximum(const SoftmaxState<Scalar>& state) {
    for (int v = 0; v < Vectors; ++v) {
      decay[v] = simd::exp2<Scalar>(simd::pmul(simd::psub(before[v], maximum[v]), factor));
      sum[v] = simd::broadcast(Scalar(0));
      simd::store(state.maximum + v * N, maximum[v]);
    }
  }
  EIGEN_ALWAYS_INLINE Packet weight(int v, Packet score) {
    const Packet weight = simd::exp2<Scalar>(simd::pmul(simd::psub(score, maximum[v]), factor));
    sum[v] = simd::padd(sum[v], weight);
    return weight;
  }
  /// Scores of keys [first, count) become weights.
  EIGEN_ALWAYS_INLINE void weights(Scalar* scores, Index first, Index count) {
    for (Index key = first; key < count; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Scalar* const at = scores + key * kWidth + v * N;
        simd::store(at, weight(v, simd::load(at)));
      }
    }
  }
  EIGEN_ALWAYS_INLINE void end(const SoftmaxState<Scalar>& state) const {
    for (int v = 0; v < Vectors; ++v) {
      simd::store(state.sum + v * N, simd::pmadd(simd::load(state.sum + v * N), decay[v], sum[v]));
    }
  }
};

/// After the last block: what the sums of weighted values of a tile have to be multiplied by, and the log-sum-exp of
/// its scores. A query without keys gets 0 and -inf, or the sink.
template <class Scalar>
struct FinishedSoftmax {
  static constexpr Index kWidth = LaneTiling<Scalar>::kWidth;
  using Lanes = Eigen::Array<double, Eigen::Dynamic, 1, 0, kWidth, 1>;

  alignas(64) Scalar inverse[kWidth];
  Lanes lse;

  FinishedSoftmax(const SoftmaxState<Scalar>& state, Index width, const ScoreFunction<Scalar>& score, Index h) {
    using Row = Eigen::Map<const Eigen::Array<Scalar, Eigen::Dynamic, 1>>;
    const double nothing = -std::numeric_limits<double>::infinity(), gain = score.params().dropout.gain();
    const std::optional<double> sink = score.sink().base2(h);
    const Lanes sum = Row(state.sum, width).template cast<double>(),
                maximum = Row(state.maximum, width).template cast<double>();
    const Lanes offset = maximum * static_cast<double>(score.factor());  // in units of log2, as all of this
    Lanes reciprocal = gain / sum;
    lse = offset + sum.log() * std::numbers::log2e;
    for (Index i = 0; i < width; ++i) {
      const bool apart = std::abs(offset[i]) > kApart<Scalar>;
      if (is_zero(sum[i])) {
        reciprocal[i] = 0, lse[i] = sink.value_or(nothing);
      } else if (sink.has_value()) {
        lse[i] = std::max(lse[i], *sink) + std::log2(1 + std::exp2(-std::abs(lse[i] - *sink)));
        reciprocal[i] = gain / (sum[i] + std::exp2(apart ? score.sink_above(h, maximum[i]) : *sink - offset[i]));
      }
      lse[i] *= std::numbers::ln2;
      // The backward pass normalises without it: here the rounding of the factor may not count
      if (apart && !is_zero(sum[i]) && !sink.has_value()) {
        lse[i] = maximum[i] * score.remaining_scale() + std::log(sum[i]);
      }
    }
    Eigen::Map<Eigen::Array<Scalar, Eigen::Dynamic, 1>>(inverse, width) = reciprocal.template cast<Scalar>();
  }
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
