#pragma once

// HEADROOM_ISA is the name of the instruction set that a unit is compiled for, by the compiler's own macros. What
// computes with vectors lies in an inline namespace of this name: units with different flags may be linked into one
// program, and each calls its own. Types that hold data only have no part in it.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HEADROOM_ISA amx
#elif defined(__AVX512BF16__)
#define HEADROOM_ISA avx512bf16
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HEADROOM_ISA avx512
#elif defined(__AVX512F__)
#define HEADROOM_ISA avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define HEADROOM_ISA avx2
#elif defined(__AVX__)
#define HEADROOM_ISA avx
#elif defined(__SSE4_1__)
#define HEADROOM_ISA sse4
#elif defined(__SSE2__)
#define HEADROOM_ISA sse2
#elif defined(__ARM_NEON)
#define HEADROOM_ISA neon
#else
#define HEADROOM_ISA scalar
#endif

#define HEADROOM_TEXT_OF(name) #name
#define HEADROOM_TEXT(name) HEADROOM_TEXT_OF(name)
#define HEADROOM_ISA_NAME HEADROOM_TEXT(HEADROOM_ISA)
