#pragma once

#include "headroom/models/separator.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
