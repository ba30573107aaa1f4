// What is compiled once of the LibTorch tier. Core's kernels are chosen at run time.

#define HEADROOM_SEPARATE_KERNELS
#define HEADROOM_KERNELS_HERE
#define HEADROOM_KERNELS_AT_RUN_TIME
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
