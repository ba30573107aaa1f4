#pragma once

#include <type_traits>

#include "headroom/core/attention/score_lanes.hpp"
#include "headroom/core/lanes.hpp"

namespace headroom::inline v0::core::detail {

/// A tile of scores [rows][width] as functions of one's own see it: pairs of a query and a key, of which one fills the
/// lanes.
template <class Scalar>
struct OwnTile {
  static constexpr Index N = simd::kLanes<Scalar>;

  Scalar* data;
  Index rows, width;
  Index batch, head, first_query, first_key;
  const Index* position;  // of the queries among the keys

  /// f(index of a packet in `data`, ScorePlace)
  template <bool QueriesInLanes, class F>
  EIGEN_ALWAYS_INLINE void for_each_packet(F&& f) const {
    const Lanes<Scalar> ascending = Eigen::internal::plset<simd::Packet<Scalar>>(Scalar(0));
    alignas(64) Scalar from_first_key[LaneTiling<Scalar>::kWidth];  // distance of a query to it, exact as an integer
    for (Index l = 0; l < width && QueriesInLanes; ++l)
      from_first_key[l] = static_cast<Scalar>(position[l] - first_key);
    for (Index r = 0; r < rows; ++r) {
      for (Index l = 0; l < width; l += N) {
        if constexpr (QueriesInLanes) {
          f(r * width + l, ScorePlace<Scalar>{batch, head, ascending + (first_query + l), first_key + r,
                                              Lanes<Scalar>(simd::load(from_first_key + l)) - r});
        } else {
          f(r * width + l, ScorePlace<Scalar>{batch, head, first_query + r, ascending + (first_key + l),
                                              Lanes<Scalar>(position[r] - first_key - l) - ascending});
        }
      }
    }
  }
};

/// What kernels that compute in float call, and those in double.
template <template <class> class CallsOf>
struct FunctionCalls {
  CallsOf<float> in_float;
  CallsOf<double> in_double;

  template <class Scalar>
  const CallsOf<Scalar>& of() const {
    if constexpr (std::is_same_v<Scalar, float>) {
      return in_float;
    } else {
      return in_double;
    }
  }
};

}  // namespace headroom::inline v0::core::detail
