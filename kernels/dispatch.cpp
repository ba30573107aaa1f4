// Which of the kernels that were compiled a program uses. CMakeLists.txt defines HEADROOM_KERNEL_SETS as
// HEADROOM_SET(name) for each instruction set, from the narrowest to the widest.

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#define HEADROOM_SEPARATE_KERNELS
#include "headroom/core/amx_permission.hpp"
#include "headroom/core/attention/choose_kernels.hpp"

namespace headroom::core::detail {

#define HEADROOM_SET(name)                    \
  inline namespace name {                     \
  const AttentionKernels& compiled_kernels(); \
  }
HEADROOM_KERNEL_SETS
#undef HEADROOM_SET

namespace {

#if defined(__x86_64__) || defined(__i386__)
bool has_amx() {
  constexpr unsigned kBfloat16 = 1U << 22, kTile = 1U << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBfloat16) != 0 && (d & kTile) != 0;
  return there && may_use_amx_tiles();
}

// All that -march=x86-64-v3 lets the compiler use: a virtual machine may hide any of it. clang 16 has no names for some
bool has_x86_64_v3() {
  constexpr unsigned kFirst = bit_CMPXCHG16B | bit_MOVBE | bit_POPCNT | bit_F16C, kExtended = bit_LZCNT | bit_LAHF_LM;
  unsigned a = 0, b = 0, first = 0, extended = 0, d = 0;
  return __get_cpuid(1, &a, &b, &first, &d) != 0 && (first & kFirst) == kFirst &&
         __get_cpuid(0x80000001, &a, &b, &extended, &d) != 0 && (extended & kExtended) == kExtended &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

// And -march=x86-64-v4
bool has_x86_64_v4() {
  return has_x86_64_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool has([[maybe_unused]] std::string_view instruction_set) {
#if defined(__x86_64__) || defined(__i386__)
  if (instruction_set == "avx2") return has_x86_64_v3();
  const bool avx512 = has_x86_64_v4();
  if (instruction_set == "avx512") return avx512;
  if (instruction_set == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (instruction_set == "amx") return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx();
#endif
  return true;  // what every processor has that programs are compiled for
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static const AttentionKernels& chosen = []() -> const AttentionKernels& {
    const KernelChoice choices[] = {
#define HEADROOM_SET(name) {&name::compiled_kernels(), has(#name)},
        HEADROOM_KERNEL_SETS
#undef HEADROOM_SET
    };
    const char* const wanted = std::getenv("HEADROOM_ISA");
    return choose_kernels(choices, wanted == nullptr ? "" : wanted);
  }();
  return chosen;
}

}  // namespace headroom::core::detail
