#pragma once

#include "headroom/core/first.hpp"

int not_an_include();
