#pragma once

#include <algorithm>
#include <concepts>
#include <type_traits>

#include "headroom/core/attention/hidden_scores.hpp"
#include "headroom/core/attention/score_lanes.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/core/stored.hpp"

namespace headroom::inline v0::core {

/// Numbers that a score function looks up, [rows][columns] next to each other, of the type that is computed in.
struct ScoreTable {
  const void* data = nullptr;
  StoredType type = StoredType::float32;
  Index rows = 1, columns = 0;

  ScoreTable() = default;
  ScoreTable(const void* numbers, StoredType number_type, Index table_rows, Index table_columns)
      : data(numbers), type(number_type), rows(table_rows), columns(table_columns) {}
  ScoreTable(const float* numbers, Index table_rows, Index table_columns)
      : data(numbers), rows(table_rows), columns(table_columns) {}
  ScoreTable(const double* numbers, Index table_rows, Index table_columns)
      : data(numbers), type(StoredType::float64), rows(table_rows), columns(table_columns) {}

  Index size() const { return rows * columns; }
};

namespace detail::inline HEADROOM_ISA {

/// An index into a table: a number for all lanes, or one for each. None that depends on a score.
template <class I, class Scalar>
concept TableIndex = std::is_arithmetic_v<I> || std::same_as<I, Lanes<Scalar>>;

/// The elements of a table that the lanes ask for. An index beyond the table takes the nearest element.
template <class Scalar>
class TablePlaces {
  using Packet = simd::Packet<Scalar>;
  static constexpr Index N = simd::kLanes<Scalar>;

 public:
  TablePlaces() = default;
  /// An index is a number for all lanes or Lanes.
  template <class Row, class Column>
  EIGEN_ALWAYS_INLINE TablePlaces(const ScoreTable& table, Row row, Column column) {
    first_ = whole(first(row), table.rows) * table.columns;
    if constexpr (std::is_arithmetic_v<Row> && std::is_arithmetic_v<Column>) {
      first_ += whole(first(column), table.columns), step_ = 0;
    } else {
      const Packet c = inside(column, table.columns);
      first_ += whole(first(Lanes<Scalar>(c)), table.columns);
      if (std::is_arithmetic_v<Row> || are_equal(Lanes<Scalar>(row).packet, simd::broadcast(first(row)))) {
        const Packet from_first = simd::psub(c, simd::broadcast(Eigen::internal::pfirst(c)));
        for (const int step : {1, -1, 0}) {
          step_ = step;
          if (are_equal(from_first, simd::pmul(simd::broadcast(Scalar(step)), ascending()))) return;
        }
      }
      scatter(table, Lanes<Scalar>(row).packet, c);
    }
  }
  /// Takes what `other` knows: the elements one by one only where it has them.
  EIGEN_ALWAYS_INLINE void assign(const TablePlaces& other) {
    first_ = other.first_, step_ = other.step_;
    if (step_ == kScattered) std::copy_n(other.element_, N, element_);
  }
  EIGEN_ALWAYS_INLINE Packet load(const Scalar* table) const {
    if (step_ == 1) return simd::load(table + first_);
    if (step_ == -1) return Eigen::internal::preverse(simd::load(table + first_ - (N - 1)));
    if (step_ == 0) return simd::broadcast(table[first_]);
    alignas(64) Scalar lanes[N];
    for (Index l = 0; l < N; ++l) lanes[l] = table[element_[l]];
    return simd::load(lanes);
  }
  /// sums[element] += x
  EIGEN_ALWAYS_INLINE void add(double* sums, Packet x) const {
    alignas(64) Scalar lanes[N];
    simd::store(lanes, step_ == -1 ? Eigen::internal::preverse(x) : x);
    if (step_ == 0) {
      double partial[4] = {};  // terms nearly cancel, so they are added in double
      for (Index l = 0; l < N; ++l) partial[l % 4] += static_cast<double>(lanes[l]);
      sums[first_] += (partial[0] + partial[1]) + (partial[2] + partial[3]);
    } else if (step_ == kScattered) {
      for (Index l = 0; l < N; ++l) sums[element_[l]] += static_cast<double>(lanes[l]);
    } else {
      double* const to = sums + first_ - (step_ == -1 ? N - 1 : 0);
      for (Index l = 0; l < N; ++l) to[l] += static_cast<double>(lanes[l]);
    }
  }

 private:
  static constexpr int kScattered = 2;

  EIGEN_ALWAYS_INLINE static Packet ascending() { return Eigen::internal::plset<Packet>(Scalar(0)); }
  template <class IndexType>
  EIGEN_ALWAYS_INLINE static Scalar first(IndexType index) {
    if constexpr (std::is_arithmetic_v<IndexType>) {
      return static_cast<Scalar>(index);
    } else {
      return Eigen::internal::pfirst(index.packet);
    }
  }
  EIGEN_ALWAYS_INLINE static Packet inside(Lanes<Scalar> index, Index count) {
    return max(min(index, count - 1), Lanes<Scalar>(0)).packet;
  }
  EIGEN_ALWAYS_INLINE static bool are_equal(Packet a, Packet b) { return !any(!LaneMask<Scalar>{simd::pcmp_eq(a, b)}); }
  EIGEN_ALWAYS_INLINE static Index whole(Scalar index, Index count) {
    if (!is_finite(index)) return 0;
    return std::min(static_cast<Index>(std::clamp<Scalar>(index, 0, static_cast<Scalar>(count))), count - 1);
  }
  EIGEN_DONT_INLINE void scatter(const ScoreTable& table, Packet row, Packet column) {
    alignas(64) Scalar rows[N], columns[N];
    simd::store(rows, row), simd::store(columns, column);
    step_ = kScattered;
    for (Index l = 0; l < N; ++l) {
      element_[l] = whole(rows[l], table.rows) * table.columns + whole(columns[l], table.columns);
    }
  }

  Index first_;
  int step_;  // from lane to lane
  Index element_[N];
};

/// A table in the hands of a score function: table(column) of a table of one row, table(row, column).
template <class Scalar>
class TableOf {
 public:
  EIGEN_ALWAYS_INLINE explicit TableOf(const ScoreTable& table) : table_(table) {}
  template <TableIndex<Scalar> Row, TableIndex<Scalar> Column>
  EIGEN_ALWAYS_INLINE Lanes<Scalar> operator()(Row row, Column column) const {
    return TablePlaces<Scalar>(table_, row, column).load(static_cast<const Scalar*>(table_.data));
  }
  template <TableIndex<Scalar> Column>
  EIGEN_ALWAYS_INLINE Lanes<Scalar> operator()(Column column) const {
    return (*this)(0, column);
  }

 private:
  const ScoreTable& table_;
};

/// Which look-up of a function the derivative is taken with respect to, and what is known of it afterwards.
template <class Scalar>
struct LookUp {
  int wanted;
  int count = 0;  // of all look-ups so far
  TablePlaces<Scalar> places = {};
  double* sums = nullptr;  // of its table
};

/// The same where the gradient of the table is asked for: one look-up carries a derivative.
template <class Scalar>
class TableWithGradient {
 public:
  EIGEN_ALWAYS_INLINE TableWithGradient(const ScoreTable& table, double* sums, LookUp<Scalar>& look_up)
      : table_(table), sums_(sums), look_up_(look_up) {}
  template <TableIndex<Scalar> Row, TableIndex<Scalar> Column>
  EIGEN_ALWAYS_INLINE Dual<Scalar> operator()(Row row, Column column) const {
    const TablePlaces<Scalar> places(table_, row, column);
    const bool is_wanted = look_up_.count++ == look_up_.wanted;
    if (is_wanted) look_up_.places.assign(places), look_up_.sums = sums_;
    return {places.load(static_cast<const Scalar*>(table_.data)), is_wanted ? 1 : 0};
  }
  template <TableIndex<Scalar> Column>
  EIGEN_ALWAYS_INLINE Dual<Scalar> operator()(Column column) const {
    return (*this)(0, column);
  }

 private:
  const ScoreTable& table_;
  double* sums_;
  LookUp<Scalar>& look_up_;
};

}  // namespace detail::inline HEADROOM_ISA
}  // namespace headroom::inline v0::core
