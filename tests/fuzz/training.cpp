// What the fuzzers of configurations, device profiles and command lines have in common: the functions that read a
// configuration, for which nothing is computed.
#define HEADROOM_TRAINING_HERE
#include "headroom/training/config.hpp"
#include "headroom/training/device_profile.hpp"
