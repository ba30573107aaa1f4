// The attention kernels, compiled once for all units of a program.

#define HEADROOM_KERNELS_HERE
#include "headroom/core/attention.hpp"
