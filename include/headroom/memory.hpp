#pragma once

#include "headroom/memory/counting_allocator.hpp"
#include "headroom/memory/device_ledger.hpp"
#include "headroom/memory/expandable_segments.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/memory/meta_allocator.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/phase_meter.hpp"
#include "headroom/memory/resident.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/memory/summary.hpp"
#include "headroom/memory/tensor_arena.hpp"
