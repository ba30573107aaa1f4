#pragma once

#include "headroom/attention.hpp"
#include "headroom/audio.hpp"
#include "headroom/checkpoint.hpp"
#include "headroom/core.hpp"
#include "headroom/dry_run.hpp"
#include "headroom/io.hpp"
#include "headroom/memory.hpp"
#include "headroom/models.hpp"
#include "headroom/nn.hpp"
#include "headroom/optim.hpp"
#include "headroom/training.hpp"
#include "headroom/weights.hpp"
