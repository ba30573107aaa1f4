// A unit that computes attention: compiled as a program for AVX-512 is, with warnings as errors. Most of GCC's that
// look at values come only with optimisation, and those of GCC 12 about its own intrinsics only here.
#include <Eigen/Dense>  // as a program does: what Eigen inlines is silent as well

#include "headroom/core/attention.hpp"

using namespace headroom::core;

void both_passes(const AttentionTensors<float>& forward, const AttentionBackwardTensors<float>& backward) {
  attention_forward<float>(forward, {}, CausalMask{});
  attention_backward<float>(backward, {}, CausalMask{});
}
