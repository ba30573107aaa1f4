#pragma once

#include "headroom/memory/allocator_model.hpp"
#include "headroom/memory/device_profile.hpp"
#include "headroom/memory/flops.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/meta_kernels.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/operator_memory.hpp"
#include "headroom/memory/plan.hpp"
#include "headroom/memory/report.hpp"
#include "headroom/memory/resident.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/memory/trace.hpp"
