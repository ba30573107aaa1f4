#pragma once

#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/module.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
