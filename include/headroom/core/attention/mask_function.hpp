#pragma once

#include <concepts>
#include <type_traits>

#include "headroom/core/attention/hidden_scores.hpp"
#include "headroom/core/attention/score_tile.hpp"
#include "headroom/core/mask.hpp"

/// Mask functions of one's own: sees = f(place) for several pairs of a query and a key at a time. What hides ranges of
/// keys from each query is better a Mask (mask.hpp), which costs nothing a pair.
namespace headroom::inline v0::core {

/// How much of a rectangle of queries and keys is seen.
enum class Seen { none, some, all };

/// Says which pairs are seen.
template <class F, class Scalar = float>
concept SeesPairs = requires(const F& f, const ScorePlace<Scalar>& place) {
  { f(place) } -> std::convertible_to<LaneMask<Scalar>>;
};
/// Says of a rectangle how much of it is seen. Tiles of which nothing is seen are not computed; without such a test the
/// function itself is asked for all pairs of a tile.
template <class F>
concept SeesBlocks = requires(const F& f, Index i, KeyRange range) {
  { f.block(i, i, range, range) } -> std::same_as<Seen>;  // (batch, head, queries, keys)
};

namespace detail {

template <class Scalar>
struct MaskFunctionCalls {
  /// Hides scores of a tile, with queries in lanes and with keys in lanes.
  void (*hide_by_query)(const void* f, const OwnTile<Scalar>& tile);
  void (*hide_by_key)(const void* f, const OwnTile<Scalar>& tile);
  /// Whether the query of a tile of one row, without data, sees any of the first `keys` keys in the lanes.
  bool (*sees_any)(const void* f, const OwnTile<Scalar>& row, Index keys);
};

inline namespace HEADROOM_ISA {

template <class F>
struct MaskFunctionLoops {
  template <class Scalar, bool QueriesInLanes>
  static void hide(const void* f, const OwnTile<Scalar>& tile) {
    for_each_packet<QueriesInLanes>(
        tile, [&](Index i, const ScorePlace<Scalar>& place) __attribute__((always_inline)) {
          const LaneMask<Scalar> sees = (*static_cast<const F*>(f))(place);
          const simd::Packet<Scalar> score = simd::load(tile.data + i);
          simd::store(tile.data + i, simd::pselect(sees.bits, score, simd::broadcast(kHidden<Scalar>)));
        });
  }
  template <class Scalar>
  static bool sees_any(const void* f, const OwnTile<Scalar>& row, Index keys) {
    bool found = false;
    for_each_packet<false>(
        row, [&](Index, const ScorePlace<Scalar>& place) __attribute__((always_inline)) {
          const LaneMask<Scalar> sees = (*static_cast<const F*>(f))(place);
          found |= any(sees && place.key < row.first_key + keys);
        });
    return found;
  }
  using Block = Seen (*)(const void* f, Index b, Index h, KeyRange queries, KeyRange keys);
  static constexpr Block block() {
    if constexpr (SeesBlocks<F>) {
      return [](const void* f, Index b, Index h, KeyRange queries, KeyRange keys) {
        return static_cast<const F*>(f)->block(b, h, queries, keys);
      };
    }
    return nullptr;
  }
};

}  // namespace HEADROOM_ISA

template <class F>
constexpr void check_mask_function() {
  static_assert(SeesPairs<F, float> && SeesPairs<F, double>,
                "a mask function needs a const operator()(place) that takes a headroom::core::ScorePlace and returns a "
                "headroom::core::LaneMask, as comparisons of its numbers do");
}

}  // namespace detail

/// A mask function seen through pointers: it has to outlive this. Default: none.
class MaskFunctionRef {
 public:
  struct Calls : detail::FunctionCalls<detail::MaskFunctionCalls> {
    Seen (*block)(const void* f, Index b, Index h, KeyRange queries, KeyRange keys);  // null: there is none
  };

  MaskFunctionRef() = default;
  MaskFunctionRef(const void* function, const Calls& calls) : function_(function), calls_(&calls) {}
  template <class F>
  explicit MaskFunctionRef(const F& function) : MaskFunctionRef(&function, calls<F>()) {}

  template <class F, class Loops = detail::MaskFunctionLoops<F>>
  static const Calls& calls() {
    detail::check_mask_function<F>();
    static constexpr Calls kCalls{
        {{Loops::template hide<float, true>, Loops::template hide<float, false>, Loops::template sees_any<float>},
         {Loops::template hide<double, true>, Loops::template hide<double, false>, Loops::template sees_any<double>},
         simd::kLanes<float>},
        Loops::block()};
    return kCalls;
  }

  explicit operator bool() const { return function_ != nullptr; }
  /// Floats in a vector where the function was compiled; 0 where there is none.
  int lanes() const { return calls_ == nullptr ? 0 : calls_->lanes; }

  /// How much of a rectangle is seen; `some` where nobody says.
  Seen block(Index b, Index h, KeyRange queries, KeyRange keys) const {
    return calls_->block == nullptr ? Seen::some : calls_->block(function_, b, h, queries, keys);
  }
  template <class Scalar>
  bool sees_any(const detail::OwnTile<Scalar>& row, Index keys) const {
    return calls_->of<Scalar>().sees_any(function_, row, keys);
  }
  template <class Scalar, bool QueriesInLanes>
  void hide(const detail::OwnTile<Scalar>& tile) const {
    const auto& calls = calls_->of<Scalar>();
    (QueriesInLanes ? calls.hide_by_query : calls.hide_by_key)(function_, tile);
  }

 private:
  const void* function_ = nullptr;
  const Calls* calls_ = nullptr;
};

}  // namespace headroom::inline v0::core
