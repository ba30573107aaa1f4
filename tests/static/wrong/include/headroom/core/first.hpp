#pragma once

#include <torch/torch.h>

#include "headroom/nn/above.hpp"

inline const char* undocumented = "headroom.core.undocumented";
