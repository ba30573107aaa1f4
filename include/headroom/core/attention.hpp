#pragma once

#include "headroom/core/attention/backward_pass.hpp"
#include "headroom/core/attention/forward.hpp"
