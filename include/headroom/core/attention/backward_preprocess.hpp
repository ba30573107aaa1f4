#pragma once

#include <bit>
#include <memory>

#include "headroom/core/attention/online_softmax.hpp"
#include "headroom/core/attention/schedule.hpp"

/// What the backward pass needs to know of each query before it meets the keys: the mean of the gradients of its
/// weights, and what its weights are normalised by.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// delta[i] = sum_d g(i,d)·o(i,d) for queries of one head: with P = weights and dP = gradients of the weights, the mean
/// sum_j P(i,j)·dP(i,j), because dP(i,j) = sum_d g(i,d)·v(j,d) and o = P·v. Added in the order in which the products
/// add dP: with one key the two are equal. `buffer` holds [3][kLanes][Dv].
template <class Scalar>
void write_delta(Scalar* delta, const RowReader<Scalar>& g, const RowReader<Scalar>& o, KeyRange queries,
                 Scalar* buffer) {
  using Packet = simd::Packet<Scalar>;
  constexpr Index N = simd::kLanes<Scalar>;
  const Index dim = g.cols();
  Scalar *const g_lanes = buffer, *const o_lanes = g_lanes + N * dim, *const spare = o_lanes + N * dim;
  for (Index next = 0; next < queries.end - queries.begin; next += N) {
    const Index first = queries.begin + whole_vector(next, queries.end - queries.begin, N);
    const KeyRange rows{first, std::min(first + N, queries.end)};
    g.pack({g_lanes, N}, rows, Times<Scalar>{1}, spare);
    o.pack({o_lanes, N}, rows, Times<Scalar>{1}, spare);
    const Packet zero = simd::broadcast(Scalar(0));
    Packet sum = zero;
    for (Index d = 0; d < dim; ++d) {
      const Packet output = simd::load(o_lanes + d * N), more = simd::pmadd(simd::load(g_lanes + d * N), output, sum);
      sum = simd::pselect(simd::pcmp_eq(output, zero), sum, more);  // no NaN where a query sees no key
    }
    alignas(64) Scalar sums[N];
    simd::store(sums, sum);
    std::copy_n(sums, rows.end - rows.begin, delta + (first - queries.begin));
  }
}

/// What weights of queries are normalised by where their log-sum-exp is too large, or no number: the largest score of
/// each, and one over the sum of weights relative to it. Found from the scores once more, by the first strip of keys.
template <class Scalar>
struct Normalisers {
  std::unique_ptr<Scalar[]> memory;  // only where it is needed, which is never planned for
  Index queries = 0;

  void allocate(Index count) {
    if (memory == nullptr) memory.reset(new Scalar[static_cast<std::size_t>(2 * count)]);
    queries = count;
  }
  Scalar* maximum() const { return memory.get(); }
  Scalar* inverse() const { return memory.get() + queries; }
};

/// Normaliser of one query, from its scores with one tile of keys after the other.
template <class Scalar>
struct NormaliserSum {
  Scalar maximum = kLeast<Scalar>;
  double sum = 0;

  template <int Vectors>
  void add(const Scalar* scores, Scalar factor) {
    using Packet = simd::Packet<Scalar>;
    constexpr Index N = simd::kLanes<Scalar>;
    Packet largest = simd::broadcast(maximum);
    for (int v = 0; v < Vectors; ++v) largest = simd::at_least(simd::load(scores + v * N), largest);
    const Scalar before = maximum;
    maximum = Eigen::internal::predux_max(largest);
    const Packet reference = simd::broadcast(maximum), factors = simd::broadcast(factor);
    Packet weights = simd::broadcast(Scalar(0));
    for (int v = 0; v < Vectors; ++v) {
      const Packet distance = simd::psub(simd::load(scores + v * N), reference);
      weights = simd::padd(weights, simd::exp2<Scalar>(simd::pmul(distance, factors)));
    }
    const double decay =
        std::exp2((static_cast<double>(before) - static_cast<double>(maximum)) * static_cast<double>(factor));
    const double more = static_cast<double>(Eigen::internal::predux(weights));
    sum = is_zero(sum) ? more : sum * decay + more;  // a decay of NaN does not count before the first weight
  }
};

/// Turns scores of a run of queries back into the weights of the forward pass.
template <class Scalar>
struct QuerySoftmax {
  using Packet = simd::Packet<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

  const Scalar *lse, *lse_rest;
  const bool* apart;                // which queries have normalisers instead, null if none has
  const Scalar *maximum, *inverse;  // normalisers

  /// Scores [rows][Vectors·N] become weights; forward did: weight = exp2((score - maximum)·factor) / sum.
  template <int Vectors>
  EIGEN_ALWAYS_INLINE void weights(Scalar* scores, Index rows, Packet factor) const {
    if (apart != nullptr) return weights_apart<Vectors>(scores, rows, factor);
    for (Index row = 0; row < rows; ++row) weights_of_row<Vectors>(scores + row * Vectors * N, row, factor);
  }

 private:
  template <int Vectors>
  EIGEN_ALWAYS_INLINE void weights_of_row(Scalar* scores, Index row, Packet factor) const {
    const Packet whole = simd::broadcast(lse[row]), rest = simd::broadcast(lse_rest[row]);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Packet s = simd::load(scores + v * N);
      if constexpr (simd::kFusedMultiplyAdd) {
        const Packet minus = simd::psub(simd::broadcast(Scalar(0)), whole);
        simd::store(scores + v * N, simd::exp2<Scalar>(simd::pmadd(s, factor, minus), rest));
      } else {
        const Packet distance = simd::pmul(simd::psub(s, whole), factor);
        simd::store(scores + v * N, simd::exp2<Scalar>(simd::psub(distance, rest)));
      }
    }
  }
  template <int Vectors>
  EIGEN_DONT_INLINE void weights_apart(Scalar* scores, Index rows, Packet factor) const {
    const Packet hidden = simd::broadcast(kHidden<Scalar>), zero = simd::broadcast(Scalar(0));
    for (Index row = 0; row < rows; ++row, scores += Vectors * N) {
      if (!apart[row]) {
        weights_of_row<Vectors>(scores, row, factor);
        continue;
      }
      const Packet largest = simd::broadcast(maximum[row]), scale = simd::broadcast(inverse[row]);
      for (int v = 0; v < Vectors; ++v) {
        const Packet s = simd::load(scores + v * N);
        const Packet weight = simd::pmul(simd::exp2<Scalar>(simd::pmul(simd::psub(s, largest), factor)), scale);
        simd::store(scores + v * N, simd::pselect(simd::pcmp_eq(s, hidden), zero, weight));
      }
    }
  }
};

/// The log-sum-exps of a block of queries in the form in which weights are computed from them.
template <class Scalar>
class BlockSoftmax {
 public:
  /// Looks which queries need normalisers: their lse is beyond kApart or NaN, but not that of one without keys.
  void find_apart(const TensorView<double>& lse, HeadIndex head, KeyRange queries) {
    constexpr auto limit = std::bit_cast<std::uint64_t>(kApart<Scalar> * std::numbers::ln2),
                   nothing = std::bit_cast<std::uint64_t>(-std::numeric_limits<double>::infinity());
    const double* const from = &lse(head.b, head.h, queries.begin, 0);
    any_apart_ = false;
    for (Index i = 0; i < queries.end - queries.begin; ++i) {
      const auto bits = std::bit_cast<std::uint64_t>(from[i * lse.strides[2]]);
      apart_[i] = (bits & ~(std::uint64_t(1) << 63)) > limit && bits != nothing;
      any_apart_ |= apart_[i];
    }
  }
  bool any_apart() const { return any_apart_; }
  bool apart(Index i) const { return apart_[i]; }

  /// Splits each lse into two numbers, because one float alone would lose too much. Where a product and a sum are
  /// rounded once, the nearest number in units of log2 and the rest. Else the score of weight 1, whose difference to
  /// the largest scores is exact, and what is left in units of log2.
  void split(const TensorView<double>& lse, HeadIndex head, KeyRange queries, double factor) {
    const double unit = simd::kFusedMultiplyAdd ? 1 : factor;
    const double* const from = &lse(head.b, head.h, queries.begin, 0);
    const Index stride = lse.strides[2];
    for (Index i = 0; i < queries.end - queries.begin; ++i) {
      const double base2 = from[i * stride] * std::numbers::log2e;
      const double whole =
          is_finite(base2) && !apart_[i] ? base2 : 0;  // a query without keys: all its scores are hidden
      lse_[i] = static_cast<Scalar>(whole / unit);
      lse_rest_[i] = static_cast<Scalar>(whole - static_cast<double>(lse_[i]) * unit);
    }
  }
  /// Queries from place `skip` of the block on, which is query `first` of its head.
  QuerySoftmax<Scalar> part(Index skip, Index first, const Normalisers<Scalar>& normalisers) const {
    if (!any_apart_) return {lse_ + skip, lse_rest_ + skip, nullptr, nullptr, nullptr};
    return {lse_ + skip, lse_rest_ + skip, apart_ + skip, normalisers.maximum() + first, normalisers.inverse() + first};
  }

 private:
  bool apart_[kBlockSize];
  bool any_apart_ = false;
  alignas(64) Scalar lse_[kBlockSize], lse_rest_[kBlockSize];
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
