#pragma once

#include "headroom/core/attention_backward.hpp"
#include "headroom/core/attention_forward.hpp"
