#pragma once

#include "headroom/training/bucket.hpp"
#include "headroom/training/cause.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/dataset.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/out_of_memory.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/schedule.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/sweep.hpp"
#include "headroom/training/trainer.hpp"
