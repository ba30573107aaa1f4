#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <utility>

#include "headroom/core/attention/score_table.hpp"
#include "headroom/core/attention/score_tile.hpp"

/// Score functions of one's own: what becomes of a score before the softmax.
///
///   score' = f(score, place, tables...)
///
/// `score` is a Lanes, a number for each of several pairs of a query and a key; `place` says which pairs (ScorePlace);
/// each table is called with an index or two and gives the numbers there. The backward pass needs d score'/d score and
/// the gradients of the tables. A function that takes any number type, as a generic lambda does, is called with a Dual
/// instead, which finds them; or it has derivative(score, place, tables...), which returns the former.
///
/// Kernels call a function through pointers, a tile at a time, and are compiled once for all functions. Where the
/// function is known only the loop over a tile is compiled, with the function inlined.
namespace headroom::inline v0::core {

/// Callable with scores, their place and `tables` tables.
template <class F, class Result, class Score, class... Tables>
concept GivesScores = requires(const F& f, Score score, const ScorePlace<float>& place, const Tables&... tables) {
  { f(score, place, tables...) } -> std::convertible_to<Result>;
};
/// Has a derivative of its own.
template <class F, class Scalar, class... Tables>
concept HasDerivative = requires(const F& f, Lanes<Scalar> score, const ScorePlace<Scalar>& place,
                                 const Tables&... tables) {
  { f.derivative(score, place, tables...) } -> std::convertible_to<Lanes<Scalar>>;
};

namespace detail {

/// What the backward pass keeps of a tile, [rows][width] each.
template <class Scalar>
struct ScoreSlopes {
  Scalar* slopes;  // derivative of the function
  Scalar* inputs;  // what it was given; null where nobody asks
};

/// What kernels that compute in Scalar call.
template <class Scalar>
struct ScoreFunctionCalls {
  /// factor·s becomes f(factor·s); queries are in lanes.
  void (*forward)(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& tile, Scalar factor);
  /// The same with keys in lanes.
  void (*backward)(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& tile, Scalar factor,
                   ScoreSlopes<Scalar> kept);
  /// Adds what a tile of gradients of f's results contributes to those of the tables, one after the other in `sums`.
  void (*add_gradients)(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& grad, const Scalar* inputs,
                        double* sums);
};

inline namespace HEADROOM_ISA {

template <class F, std::size_t Tables>
struct ScoreFunctionLoops {
  template <class Scalar>
  static void forward(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& tile, Scalar factor) {
    for_each_packet<true>(
        tile, [&](Index i, const ScorePlace<Scalar>& place) __attribute__((always_inline)) {
          const Lanes<Scalar> score = Lanes<Scalar>(simd::load(tile.data + i)) * factor;
          const Lanes<Scalar> result = with_tables<Scalar>(
              tables, [&](const auto&... table) { return Lanes<Scalar>(function(f)(score, place, table...)); });
          simd::store(tile.data + i, lifted<Scalar>(result.packet));
        });
  }
  template <class Scalar>
  static void backward(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& tile, Scalar factor,
                       ScoreSlopes<Scalar> kept) {
    for_each_packet<false>(
        tile, [&](Index i, const ScorePlace<Scalar>& place) __attribute__((always_inline)) {
          const Lanes<Scalar> score = Lanes<Scalar>(simd::load(tile.data + i)) * factor;
          const Dual<Scalar> result = with_tables<Scalar>(
              tables, [&](const auto&... table) { return differentiated(function(f), score, place, table...); });
          simd::store(tile.data + i, lifted<Scalar>(result.value.packet));
          simd::store(kept.slopes + i, result.slope.packet);
          if (kept.inputs != nullptr) simd::store(kept.inputs + i, score.packet);
        });
  }
  template <class Scalar>
  static void add_gradients(const void* f, const ScoreTable* tables, const OwnTile<Scalar>& grad, const Scalar* inputs,
                            double* sums) {
    if constexpr (Tables > 0) {
      std::array<double*, Tables> sums_of;
      for (std::size_t t = 0; t < Tables; sums += tables[t++].size()) sums_of[t] = sums;
      for_each_packet<false>(
          grad, [&](Index i, const ScorePlace<Scalar>& place) __attribute__((always_inline)) {
            const simd::Packet<Scalar> by_result = simd::load(grad.data + i);
            const Lanes<Scalar> score = simd::load(inputs + i);
            int count = 1;
            for (int wanted = 0; wanted < count; ++wanted) {
              LookUp<Scalar> look_up{wanted};
              const Dual<Scalar> result = [&]<std::size_t... T>(std::index_sequence<T...>)
                  __attribute__((always_inline)) {
                return Dual<Scalar>(
                    function(f)(score, place, TableWithGradient<Scalar>(tables[T], sums_of[T], look_up)...));
              }
              (std::make_index_sequence<Tables>());
              count = look_up.count;
              if (wanted >= count) break;
              look_up.places.add(look_up.sums, unless_zero(by_result, simd::pmul(by_result, result.slope.packet)));
            }
          });
    }
  }

 private:
  static const F& function(const void* f) { return *static_cast<const F*>(f); }
  /// A result and its derivative with respect to the score.
  template <class Scalar, class... TablesOf>
  EIGEN_ALWAYS_INLINE static Dual<Scalar> differentiated(const F& f, Lanes<Scalar> score,
                                                         const ScorePlace<Scalar>& place, const TablesOf&... tables) {
    if constexpr (HasDerivative<F, Scalar, TablesOf...>) {
      return {f(score, place, tables...), f.derivative(score, place, tables...)};
    } else {
      return f(Dual<Scalar>{score, 1}, place, tables...);
    }
  }
  template <class Scalar, class Call>
  EIGEN_ALWAYS_INLINE static auto with_tables(const ScoreTable* tables, Call&& call) {
    return [&]<std::size_t... T>(std::index_sequence<T...>) __attribute__((always_inline)) {
      return call(TableOf<Scalar>(tables[T])...);
    }
    (std::make_index_sequence<Tables>());
  }
};

}  // namespace HEADROOM_ISA

/// Fails to compile unless F is a score function of so many tables.
template <class F, std::size_t... T>
constexpr void check_score_function(std::index_sequence<T...>) {
  static_assert(
      GivesScores<F, Lanes<float>, Lanes<float>, decltype((void)T, TableOf<float>(ScoreTable()))...>,
      "a score function needs a const operator()(score, place, tables...) that takes headroom::core::Lanes, a "
      "headroom::core::ScorePlace and as many tables as it is given, and returns Lanes");
  static_assert(
      GivesScores<F, Dual<float>, Dual<float>, decltype((void)T, TableOf<float>(ScoreTable()))...> ||
          HasDerivative<F, float, decltype((void)T, TableOf<float>(ScoreTable()))...>,
      "a score function needs a derivative: let operator() take headroom::core::Dual too, as a generic lambda does, or "
      "add a const member derivative(score, place, tables...) that returns d score' / d score as Lanes");
  static_assert(
      sizeof...(T) == 0 ||
          GivesScores<F, Dual<float>, Lanes<float>, decltype((void)T, std::declval<TableWithGradient<float>>())...>,
      "a score function with tables needs their gradients: let operator() take any type of table, which gives "
      "headroom::core::Dual there");
}

}  // namespace detail

/// A score function and its tables, seen through pointers: both have to outlive it. Default: none.
class ScoreFunctionRef {
 public:
  /// What is called where it computes in float, and in double.
  struct Calls : detail::FunctionCalls<detail::ScoreFunctionCalls> {
    std::size_t tables;
  };

  ScoreFunctionRef() = default;
  ScoreFunctionRef(const void* function, const Calls& calls, const ScoreTable* tables)
      : function_(function), calls_(&calls), tables_(tables) {}
  template <class F>
  explicit ScoreFunctionRef(const F& function) : ScoreFunctionRef(&function, calls<F, 0>(), nullptr) {}
  template <class F, std::size_t N>
  ScoreFunctionRef(const F& function, const std::array<ScoreTable, N>& tables)
      : ScoreFunctionRef(&function, calls<F, N>(), tables.data()) {}

  template <class F, std::size_t N, class Loops = detail::ScoreFunctionLoops<F, N>>
  static const Calls& calls() {
    detail::check_score_function<F>(std::make_index_sequence<N>());
    static constexpr Calls kCalls{
        {{Loops::template forward<float>, Loops::template backward<float>, Loops::template add_gradients<float>},
         {Loops::template forward<double>, Loops::template backward<double>, Loops::template add_gradients<double>},
         simd::kLanes<float>},
        N};
    return kCalls;
  }

  explicit operator bool() const { return function_ != nullptr; }
  /// Floats in a vector where the function was compiled; 0 where there is none.
  int lanes() const { return calls_ == nullptr ? 0 : calls_->lanes; }
  Index tables() const { return calls_ == nullptr ? 0 : static_cast<Index>(calls_->tables); }
  const ScoreTable& table(Index i) const { return tables_[i]; }
  /// Elements of all tables.
  Index table_size() const {
    Index size = 0;
    for (Index i = 0; i < tables(); ++i) size += table(i).size();
    return size;
  }

  template <class Scalar>
  void forward(const detail::OwnTile<Scalar>& tile, Scalar factor) const {
    calls_->of<Scalar>().forward(function_, tables_, tile, factor);
  }
  template <class Scalar>
  void backward(const detail::OwnTile<Scalar>& tile, Scalar factor, detail::ScoreSlopes<Scalar> kept) const {
    calls_->of<Scalar>().backward(function_, tables_, tile, factor, kept);
  }
  template <class Scalar>
  void add_gradients(const detail::OwnTile<Scalar>& grad, const Scalar* inputs, double* sums) const {
    calls_->of<Scalar>().add_gradients(function_, tables_, grad, inputs, sums);
  }

 private:
  const void* function_ = nullptr;
  const Calls* calls_ = nullptr;
  const ScoreTable* tables_ = nullptr;
};

}  // namespace headroom::inline v0::core
