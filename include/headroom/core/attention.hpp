#pragma once

#include "headroom/core/intrinsics_warnings.hpp"

HEADROOM_INTRINSICS_BEGIN
#include "headroom/core/attention/entry.hpp"
HEADROOM_INTRINSICS_END
