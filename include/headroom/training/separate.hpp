#pragma once

/// Models, trainer and planner take about a minute and a half to compile. With HEADROOM_SEPARATE_TRAINING defined the
/// functions that hold most of it are just declared, and one unit of the program, which also defines
/// HEADROOM_TRAINING_HERE, holds them:
///
///     #define HEADROOM_TRAINING_HERE
///     #include "headroom/training.hpp"
#ifdef HEADROOM_SEPARATE_TRAINING
#define HEADROOM_TRAINING
#else
#define HEADROOM_TRAINING inline
#define HEADROOM_TRAINING_HERE
#endif
