#pragma once

#include "headroom/training/config.hpp"
#include "support/tiny_separator.hpp"

namespace headroom::testing {

/// A configuration for 512-sample noise, changed as a JSON merge patch says; TinySeparator does not use its model.
inline training::Config tiny_config(const training::Json& changes = training::Json::object()) {
  training::Json config = training::Json::parse(R"({
    "model": {"n_fft": 64, "hop_length": 32, "n_layers": 1, "emb_dim": 8, "n_heads": 2, "ffn_hidden_dim": [16]},
    "training": {"segment_length": 512, "batch_size": 2, "steps_per_epoch": 4, "epochs": 3, "learning_rate": 0.01,
                 "warmup_steps": 2},
    "loss": {"windows": [256, 128], "hop": 64, "min_n_fft": 256}})");
  config.merge_patch(changes);
  return training::parse_config(config.dump(), "test");
}

inline training::Example noise_source(int64_t first, int64_t count) { return noise_examples(first, count); }

}  // namespace headroom::testing
