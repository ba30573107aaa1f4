#pragma once

#include "headroom/optim/adamw.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/muon.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"
#include "headroom/optim/prodigy.hpp"
#include "headroom/optim/radam.hpp"
#include "headroom/optim/sgd.hpp"
