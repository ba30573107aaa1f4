#pragma once

#include <type_traits>

#include "headroom/core/attention/score_lanes.hpp"
#include "headroom/core/lanes.hpp"

namespace headroom::inline v0::core::detail {

/// A tile of scores [rows][width] as functions of one's own see it: pairs of a query and a key, of which one fills the
/// lanes.
template <class Scalar>
struct OwnTile {
  Scalar* data;
  Index rows, width;
  Index batch, head, first_query, first_key;
  const Index* position;  // of the queries among the keys
};

/// What kernels that compute in float call, and those in double.
template <template <class> class CallsOf>
struct FunctionCalls {
  CallsOf<float> in_float;
  CallsOf<double> in_double;
  int lanes;  // floats in a vector where the function was compiled: tiles have to be whole vectors wide

  template <class Scalar>
  const CallsOf<Scalar>& of() const {
    if constexpr (std::is_same_v<Scalar, float>) {
      return in_float;
    } else {
      return in_double;
    }
  }
};

inline namespace HEADROOM_ISA {

/// f(index of a packet in the tile's data, ScorePlace)
template <bool QueriesInLanes, class Scalar, class F>
EIGEN_ALWAYS_INLINE void for_each_packet(const OwnTile<Scalar>& tile, F&& f) {
  constexpr Index N = simd::kLanes<Scalar>;
  const Lanes<Scalar> ascending = Eigen::internal::plset<simd::Packet<Scalar>>(Scalar(0));
  alignas(64) Scalar from_first_key[kWidestTile];  // distance of a query to it, exact as an integer
  for (Index l = 0; l < tile.width && QueriesInLanes; ++l) {
    from_first_key[l] = static_cast<Scalar>(tile.position[l] - tile.first_key);
  }
  for (Index r = 0; r < tile.rows; ++r) {
    for (Index l = 0; l < tile.width; l += N) {
      if constexpr (QueriesInLanes) {
        f(r * tile.width + l,
          ScorePlace<Scalar>{tile.batch, tile.head, ascending + (tile.first_query + l), tile.first_key + r,
                             Lanes<Scalar>(simd::load(from_first_key + l)) - r});
      } else {
        f(r * tile.width + l,
          ScorePlace<Scalar>{tile.batch, tile.head, tile.first_query + r, ascending + (tile.first_key + l),
                             Lanes<Scalar>(tile.position[r] - tile.first_key - l) - ascending});
      }
    }
  }
}

}  // namespace HEADROOM_ISA
}  // namespace headroom::inline v0::core::detail
