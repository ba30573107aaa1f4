#pragma once

#include <cstddef>
#include <cstdint>

namespace headroom::testing {

/// How often the host has waited for CUDA so far.
int64_t synchronizations();

}  // namespace headroom::testing
