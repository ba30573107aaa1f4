#pragma once

#include <torch/types.h>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::nn::detail {

/// The dimension of tokens x [..., dim] that `axis` means, counted from the front; a negative axis counts from the
/// back. Fails with `id` unless x has that width and the axis is one of its token dimensions.
inline int64_t token_axis(const torch::Tensor& x, int64_t axis, int64_t dim, const char* id) {
  const int64_t rank = x.dim(), front = axis < 0 ? axis + rank : axis;
  require(rank >= 2 && x.size(-1) == dim && 0 <= front && front < rank - 1, id, "x is ", x.sizes(), " and the axis ",
          axis, "; expected [...,L,", dim, "] and an axis before the last");
  return front;
}

}  // namespace headroom::inline v0::nn::detail
