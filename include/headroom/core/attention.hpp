#pragma once

#include "headroom/core/attention/entry.hpp"
