#pragma once

// GCC 12 takes the registers that its own AVX-512 intrinsics leave undefined on purpose for mistakes, and says so
// wherever they are inlined (GCC bug 105593): hundreds of warnings in a unit that computes attention. Between these two
// macros it is silent about them.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ == 12
#define HEADROOM_INTRINSICS_BEGIN                                                      \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wuninitialized\"") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define HEADROOM_INTRINSICS_END _Pragma("GCC diagnostic pop")
#else
#define HEADROOM_INTRINSICS_BEGIN
#define HEADROOM_INTRINSICS_END
#endif
