#pragma once

#include "headroom/models/time_frequency_transformer.hpp"
