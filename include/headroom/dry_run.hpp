#pragma once

#include "headroom/dry_run/device.hpp"
#include "headroom/dry_run/operator.hpp"
#include "headroom/dry_run/phase.hpp"
#include "headroom/dry_run/repetition.hpp"
