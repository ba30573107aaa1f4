#pragma once

#include "headroom/attention/attention.hpp"
#include "headroom/attention/options.hpp"
#include "headroom/attention/packed.hpp"
#include "headroom/attention/reference.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/attention/tiled.hpp"
