#pragma once

#include <utility>

#include "headroom/core/attention/hidden_scores.hpp"
#include "headroom/core/attention/problem.hpp"
#include "headroom/core/softplus.hpp"

/// What position embeddings make of rows of q and k when kernels read them, and of rows of gradients when they are
/// written.
namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// A table of angles, of which each row of q or of k has one row.
template <class Scalar>
class AngleTable {
 public:
  AngleTable() = default;  // none
  static AngleTable of_queries(const AttentionParams& params, const StoredTensor& table) {
    return {params, table, /*of_keys=*/false};
  }
  static AngleTable of_keys(const AttentionParams& params, const StoredTensor& table) {
    return {params, table, /*of_keys=*/true};
  }

  explicit operator bool() const { return params_ != nullptr; }
  Index cols() const { return table_->dim(); }
  /// Of row `index` of the tensor.
  const Scalar* row(Index index) const {
    const Index row = of_keys_ ? params_->table_row_of_key(index) : params_->table_row_of_query(index);
    return static_cast<const Scalar*>(table_->data) + row * table_->strides[2];
  }

 private:
  AngleTable(const AttentionParams& params, const StoredTensor& table, bool of_keys)
      : params_(table ? &params : nullptr), table_(&table), of_keys_(of_keys) {}

  const AttentionParams* params_ = nullptr;
  const StoredTensor* table_ = nullptr;
  bool of_keys_ = false;
};

/// Rotary embedding of rows: neighbouring pairs of features turn by the angles of the row's position.
template <class Scalar>
class Rotation {
 public:
  Rotation() = default;  // turns nothing
  explicit Rotation(const AngleTable<Scalar>& angles) : angles_(angles) {}

  explicit operator bool() const { return static_cast<bool>(angles_); }

  /// to = row `index` of the tensor [cols], turned forward or back; may be in place.
  void apply(Scalar* to, const Scalar* from, Index cols, Index index, bool back) const {
    const Scalar* const angle = angles_.row(index);
    const Scalar sign = back ? Scalar(-1) : Scalar(1);
    const Index turned = angles_.cols();
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (Index p = 0; p < turned; p += 2) {
      const Scalar x = from[p], y = from[p + 1], cosine = angle[p], sine = sign * angle[p + 1];
      to[p] = x * cosine - y * sine;
      to[p + 1] = x * sine + y * cosine;
    }
    if (to != from) std::copy(from + turned, from + cols, to + turned);
  }

 private:
  AngleTable<Scalar> angles_;
};

/// Polar position embedding of rows x [D] (PoPE; Gopalakrishnan et al. 2025): feature d becomes the complex number of
/// magnitude softplus(x_d) and of the angle of the row's position, for keys with a phase more. A row in polar form has
/// D real parts, then D imaginary ones.
template <class Scalar>
class PolarForm {
  using Packet = simd::Packet<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

 public:
  PolarForm() = default;  // of nothing
  /// `phase` [2D] has cosines and sines; null: none.
  PolarForm(const AngleTable<Scalar>& angles, const StoredMatrix& x, const Scalar* phase = nullptr)
      : angles_(angles), x_(x), phase_(phase) {}

  explicit operator bool() const { return static_cast<bool>(angles_); }

  /// to [2D] = row `index`, of which `from` are the features; both may begin at the same place.
  void apply(Scalar* to, const Scalar* from, Index index) const {
    const Turns turns(*this, index);
    for (Index first = 0; first < x_.cols; first += kGroup * N) {
      const Index end = std::min(first + kGroup * N, x_.cols);
      Packet x[kGroup], power[kGroup];
      each_packet(
          first, end, [&](Index place, Index d, Index count) __attribute__((always_inline)) {
            x[place] = load(from + d, count), power[place] = exp_of_minus_size<Scalar>(x[place]);
          });
      each_packet(
          first, end, [&](Index place, Index d, Index count) __attribute__((always_inline)) {
            const Packet magnitude = softplus<Scalar>(x[place], power[place]);
            const auto [cosine, sine] = turns.at(d, count);
            store(to + d, simd::pmul(magnitude, cosine), count);
            store(to + x_.cols + d, simd::pmul(magnitude, sine), count);
          });
    }
  }
  /// to [D]: gradient of row `index` by that in polar form, `grad` [2D]; both may begin at the same place. What has no
  /// gradient stays without, whatever the features are. That of the angles is added to `angles` [D], unless it is null.
  void back(Scalar* to, const Scalar* grad, Index index, double* angles) const {
    const Turns turns(*this, index);
    each_packet(
        0, x_.cols, [&](Index, Index d, Index count) __attribute__((always_inline)) {
          const Packet real = load(grad + d, count), imaginary = load(grad + x_.cols + d, count);
          const auto [cosine, sine] = turns.at(d, count);
          const Packet x = features(index, d, count), power = exp_of_minus_size<Scalar>(x);
          const Packet along = simd::pmadd(real, cosine, simd::pmul(imaginary, sine));
          store(to + d, unless_zero(along, simd::pmul(along, sigmoid<Scalar>(x, power))), count);
          if (angles == nullptr) return;
          const Packet across = simd::psub(simd::pmul(imaginary, cosine), simd::pmul(real, sine));
          alignas(64) Scalar lanes[N];
          simd::store(lanes, unless_zero(across, simd::pmul(across, softplus<Scalar>(x, power))));
          for (Index l = 0; l < count; ++l) angles[d + l] += static_cast<double>(lanes[l]);
        });
  }

  // back() in two steps around a sum of gradients: the first for each that is added, the second for the sum.
  void magnitude_gradient(Scalar* to, const Scalar* grad, Index index) const {
    const Turns turns(*this, index);
    each_packet(
        0, x_.cols, [&](Index, Index d, Index count) __attribute__((always_inline)) {
          const auto [cosine, sine] = turns.at(d, count);
          const Packet imaginary = load(grad + x_.cols + d, count);
          store(to + d, simd::pmadd(load(grad + d, count), cosine, simd::pmul(imaginary, sine)), count);
        });
  }
  void feature_gradient(Scalar* grad, Index index) const {
    each_packet(
        0, x_.cols, [&](Index, Index d, Index count) __attribute__((always_inline)) {
          const Packet g = load(grad + d, count), x = features(index, d, count);
          store(grad + d, unless_zero(g, simd::pmul(g, sigmoid<Scalar>(x, exp_of_minus_size<Scalar>(x)))), count);
        });
  }

 private:
  /// Packets whose exponentials are computed before their logarithms: chains of operations that overlap.
  static constexpr Index kGroup = 4;

  /// Cosines and sines of the angles of a row.
  class Turns {
   public:
    EIGEN_ALWAYS_INLINE Turns(const PolarForm& form, Index index)
        : dim_(form.x_.cols), table_(form.angles_.row(index)), phase_(form.phase_) {}
    EIGEN_ALWAYS_INLINE std::pair<Packet, Packet> at(Index d, Index count) const {
      const Packet c = load(table_ + d, count), s = load(table_ + dim_ + d, count);
      if (phase_ == nullptr) return {c, s};
      const Packet pc = load(phase_ + d, count), ps = load(phase_ + dim_ + d, count);
      return {simd::psub(simd::pmul(c, pc), simd::pmul(s, ps)), simd::pmadd(s, pc, simd::pmul(c, ps))};
    }

   private:
    Index dim_;
    const Scalar *table_, *phase_;
  };

  /// f(place, d, count) for features [first, end), up to N at a time.
  template <class F>
  EIGEN_ALWAYS_INLINE static void each_packet(Index first, Index end, F&& f) {
    Index d = first;
    for (; d + N <= end; d += N) f((d - first) / N, d, N);
    if (d < end) f((d - first) / N, d, end - d);
  }
  EIGEN_ALWAYS_INLINE static Packet load(const Scalar* from, Index count) {
    if (count >= N) return simd::load(from);
    alignas(64) Scalar lanes[N] = {};
    std::copy_n(from, count, lanes);
    return simd::load(lanes);
  }
  EIGEN_ALWAYS_INLINE static void store(Scalar* to, const Packet& x, Index count) {
    if (count >= N) return simd::store(to, x);
    alignas(64) Scalar lanes[N];
    simd::store(lanes, x);
    std::copy_n(lanes, count, to);
  }
  EIGEN_ALWAYS_INLINE Packet features(Index row, Index d, Index count) const {
    if (x_.holds<Scalar>() && x_.col_stride == 1) return load(&x_.as<Scalar>()(row, d), count);
    alignas(64) Scalar lanes[N] = {};
    x_.visit([&](auto x) {
      for (Index l = 0; l < count; ++l) lanes[l] = static_cast<Scalar>(x(row, d + l));
    });
    return simd::load(lanes);
  }

  AngleTable<Scalar> angles_;
  StoredMatrix x_;
  const Scalar* phase_ = nullptr;
};

/// One of the two, or none.
template <class Scalar>
class RowPositions {
 public:
  RowPositions() = default;
  RowPositions(const Rotation<Scalar>& rotation, const PolarForm<Scalar>& polar) : rotation_(rotation), polar_(polar) {}

  explicit operator bool() const { return rotation_ || polar_; }
  /// Numbers in a row of `cols` features that is multiplied.
  Index features(Index cols) const { return polar_ ? 2 * cols : cols; }

  /// to [features(cols)] = row `index` of the tensor; both may begin at the same place.
  void apply(Scalar* to, const Scalar* from, Index cols, Index index) const {
    polar_ ? polar_.apply(to, from, index) : rotation_.apply(to, from, cols, index, /*back=*/false);
  }
  /// to [cols]: gradient of row `index` by that of what apply() makes of it; may begin where `grad` does. That of the
  /// phases of keys is added to `phase`, unless it is null.
  void back(Scalar* to, const Scalar* grad, Index cols, Index index, double* phase) const {
    polar_ ? polar_.back(to, grad, index, phase) : rotation_.apply(to, grad, cols, index, /*back=*/true);
  }

  // The same in two steps around a sum of gradients: the first for each that is added, the second for the sum.
  /// Rows [count][stride] of gradients become what is summed: their first columns.
  void before_sum(Scalar* rows, Index stride, Index first, Index count) const {
    for (Index i = 0; i < count && polar_; ++i) {
      polar_.magnitude_gradient(rows + i * stride, rows + i * stride, first + i);
    }
  }
  void after_sum(Scalar* row, Index cols, Index index) const {
    if (polar_) return polar_.feature_gradient(row, index);
    if (rotation_) rotation_.apply(row, row, cols, index, /*back=*/true);
  }

 private:
  Rotation<Scalar> rotation_;
  PolarForm<Scalar> polar_;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
