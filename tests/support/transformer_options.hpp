#pragma once

#include "headroom/models/time_frequency_transformer.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::testing {

/// The options of the model of a configuration, which is a time-frequency transformer.
inline models::TimeFrequencyTransformerOptions& transformer(training::Config& config) {
  return config.model.as<models::TimeFrequencyTransformerOptions>();
}
inline const models::TimeFrequencyTransformerOptions& transformer(const training::Config& config) {
  return config.model.as<models::TimeFrequencyTransformerOptions>();
}

}  // namespace headroom::testing
