#pragma once

// audio/file.hpp and audio/separator.hpp need libsndfile: headroom::training links it, headroom/training.hpp has them.
#include "headroom/audio/container.hpp"
#include "headroom/audio/losses.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/audio/stft.hpp"
