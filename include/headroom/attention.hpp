#pragma once

#include "headroom/attention/attention.hpp"
#include "headroom/attention/chunked.hpp"
#include "headroom/attention/dropout.hpp"
#include "headroom/attention/fused.hpp"
#include "headroom/attention/merge.hpp"
#include "headroom/attention/options.hpp"
#include "headroom/attention/packed.hpp"
#include "headroom/attention/reference.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/attention/scores.hpp"
#include "headroom/attention/tiled.hpp"
#include "headroom/attention/weights.hpp"
