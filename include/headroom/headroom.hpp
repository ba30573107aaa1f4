#pragma once

#include "headroom/attention.hpp"
#include "headroom/audio.hpp"
#include "headroom/checkpoint.hpp"
#include "headroom/core.hpp"
#include "headroom/io.hpp"
#include "headroom/memory.hpp"
#include "headroom/models.hpp"
#include "headroom/nn.hpp"
#include "headroom/optim.hpp"
#include "headroom/plan.hpp"
#include "headroom/runtime.hpp"
#include "headroom/training.hpp"
