// What is compiled once of the LibTorch tier; and core's kernels, unless they are chosen at run time.

#define HEADROOM_KERNELS_HERE
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
