// The attention kernels, for the instruction set that this unit is compiled for: CMakeLists.txt compiles it once for
// each.

#include <string_view>

#define HEADROOM_SEPARATE_KERNELS
#include "headroom/core/attention/kernels.hpp"

namespace headroom::core::detail::inline HEADROOM_ISA {
static_assert(
    std::string_view(HEADROOM_ISA_NAME) == HEADROOM_EXPECTED_ISA,
    "this unit is compiled for another instruction set than its own: flags of the project, as in CMAKE_CXX_FLAGS, "
    "change it; let the units that need them have them");

const AttentionKernels& compiled_kernels() { return kernels_of_this_unit(); }

}  // namespace headroom::core::detail::HEADROOM_ISA
