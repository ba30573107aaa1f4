#pragma once

// Functions that take long to compile, or are slow without optimisation, are marked HEADROOM_KERNEL. By default they
// are inline, as everything is. A program of several units that defines HEADROOM_SEPARATE_KERNELS only sees them
// declared, and compiles them in one unit, which also defines HEADROOM_KERNELS_HERE and includes what the program uses,
// or headroom/headroom.hpp. Definitions stand between `#ifdef HEADROOM_DEFINE_KERNELS` and `#endif`.
//
// The CMake target headroom::kernels is that unit for all programs, and has core's kernels for several instruction sets
// (kernels/).

#ifdef HEADROOM_SEPARATE_KERNELS
#define HEADROOM_KERNEL
#else
#define HEADROOM_KERNEL inline
#endif

#if !defined(HEADROOM_SEPARATE_KERNELS) || defined(HEADROOM_KERNELS_HERE)
#define HEADROOM_DEFINE_KERNELS
#endif
