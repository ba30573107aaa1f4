#pragma once

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/module.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
