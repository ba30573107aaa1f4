#pragma once

#include "headroom/core/view.hpp"

namespace headroom::testing {

/// Attention of one batch, dense arrays [heads][length][dim]: what a unit reads, and where it writes.
struct Arrays {
  core::Index heads, length, dim;
  const float *q, *k, *v, *grad_output;
  float *output, *grad_q, *grad_k, *grad_v;
  double* lse;
  const Eigen::bfloat16 *narrow_q, *narrow_k, *narrow_v;
  Eigen::bfloat16* narrow_output;
};

/// Both passes in float, and the forward pass in bfloat16, by the kernels that the unit calls; their instruction set.
using Attend = const char*(const Arrays& x);
Attend attend_program, attend_plain, attend_avx2, attend_avx512f, attend_native;

}  // namespace headroom::testing
