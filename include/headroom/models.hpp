#pragma once

#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/htdemucs.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
