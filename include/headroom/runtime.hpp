#pragma once

#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/gradient_hooks.hpp"
#include "headroom/runtime/operator.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/runtime/random_state.hpp"
#include "headroom/runtime/repetition.hpp"
#include "headroom/runtime/torch_version.hpp"
