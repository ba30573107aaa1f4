#pragma once

#include "headroom/memory/format.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/resident.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/memory/summary.hpp"
