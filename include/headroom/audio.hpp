#pragma once

#include "headroom/audio/file.hpp"
#include "headroom/audio/losses.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/audio/stft.hpp"
