#pragma once

#include <sndfile.h>

inline auto bytes = torch::pickle_save(c10::IValue(3));
