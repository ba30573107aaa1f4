#pragma once

#include "headroom/runtime/ambient_state.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/operator.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/runtime/repetition.hpp"
