#pragma once

#include "headroom/checkpoint/ambient_state.hpp"
#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/host_copies.hpp"
#include "headroom/checkpoint/kept_results.hpp"
#include "headroom/checkpoint/module.hpp"
#include "headroom/checkpoint/piece_gradients.hpp"
#include "headroom/checkpoint/policy.hpp"
#include "headroom/checkpoint/reversible.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/checkpoint/stack.hpp"
#include "headroom/checkpoint/storage.hpp"
#include "headroom/checkpoint/tiled.hpp"
