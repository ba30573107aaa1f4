#pragma once

#include "headroom/optim/adamw.hpp"
#include "headroom/optim/adamw_state.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/optim/moment.hpp"
