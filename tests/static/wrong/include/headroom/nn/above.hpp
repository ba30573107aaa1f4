#pragma once

#include <sndfile.h>
#include <torch/csrc/autograd/engine.h>

inline auto bytes = torch::pickle_save(c10::IValue(3));
