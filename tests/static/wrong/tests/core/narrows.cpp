#include "headroom/core/narrows.hpp"
