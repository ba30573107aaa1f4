#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/attention/options.hpp"
#include "headroom/core/error.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/models/roformer/bands.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"

// What the registry has of BS-RoFormer and Mel-Band RoFormer.
namespace headroom::inline v0::training::detail {

inline std::vector<models::Band> bands_of(const models::BsRoformerOptions& model, const Config&) {
  return models::adjacent_bands(model.freqs_per_bands(), model.bins());
}
inline std::vector<models::Band> bands_of(const models::MelBandRoformerOptions& model, const Config& config) {
  return models::mel_bands(model.num_bands(), model.stft_n_fft(), config.audio.sample_rate);
}
inline int64_t band_count(const models::BsRoformerOptions& model) {
  return static_cast<int64_t>(model.freqs_per_bands().size());
}
inline int64_t band_count(const models::MelBandRoformerOptions& model) { return model.num_bands(); }
inline const char* bands_key(const models::BsRoformerOptions&) { return "model.freqs_per_bands"; }
inline const char* bands_key(const models::MelBandRoformerOptions&) { return "model.num_bands"; }

/// Options with what other sections of a configuration say.
template <class Options>
Options roformer_options(Options model, const Config& config) {
  model.channels(config.audio.channels)
      .stems(static_cast<int64_t>(config.audio.stems.size()))
      .gradient_checkpointing(config.model.gradient_checkpointing)
      .attention(attention_backend(config.model.attention));
  if constexpr (requires { model.sample_rate(0); }) model.sample_rate(config.audio.sample_rate);
  return model;
}

template <class Options>
void check_roformer(const Options& model, const Config& config, Rules& rule) {
  const int64_t n_fft = model.stft_n_fft(), hop = model.stft_hop_length(), window = model.stft_win_length();
  rule(
      {"model.dim_head"}, [&] { return model.dim_head() % 2 == 0; }, "got ", model.dim_head(),
      ", expected an even number, for the rotary embedding");
  rule(
      {"model.stft_n_fft"}, [&] { return n_fft % 2 == 0; }, "got ", n_fft, ", expected an even number");
  rule(
      {"model.stft_win_length", "model.stft_n_fft"}, [&] { return window <= n_fft; }, "got ", window,
      ", expected at most model.stft_n_fft, which is ", n_fft);
  rule(
      {"model.stft_hop_length", "model.stft_win_length"}, [&] { return hop <= window / 2; }, "got ", hop,
      ", expected at most half of model.stft_win_length, which is ", window, ", else the spectrum has no inverse");
  rule(
      {"training.segment_length", "model.stft_n_fft"}, [&] { return config.training.segment_length >= n_fft; }, "got ",
      config.training.segment_length, ", expected at least model.stft_n_fft, which is ", n_fft);
  std::string reason;
  const auto has_bands = [&] {
    try {
      bands_of(model, config);
    } catch (const Error& error) {
      reason = error.what();
    }
    return reason.empty();
  };
  if (!rule.any_wrong_in("model") && !has_bands()) {
    rule(
        {bands_key(model), "model.stft_n_fft"}, [] { return false; }, reason);
  }
}

/// Bytes of the attention scores of a forward pass, if attention stored them.
template <class Options>
int64_t roformer_scores_bytes(const Options& model, int64_t batch, int64_t samples) {
  const int64_t frames = model.frames(samples), bands = band_count(model);
  const int64_t scores = model.time_transformer_depth() * bands * frames * frames +
                         model.freq_transformer_depth() * frames * bands * bands;
  return model.depth() * batch * model.heads() * scores * static_cast<int64_t>(sizeof(float));
}

template <class Options>
std::string roformer_summary(const Options& model, int64_t samples) {
  std::ostringstream text;
  text << model.depth() << " layers, width " << model.dim() << ", " << model.heads() << " heads; "
       << model.frames(samples) * band_count(model) << " tokens a segment (" << model.frames(samples) << " frames x "
       << band_count(model) << " bands)";
  return text.str();
}

template <class Model, class Options>
ModelEntry<Options> roformer() {
  return {.make = [](const Options& model, const Config& config) { return Model(roformer_options(model, config)); },
          .blocks = [](const Options& model) { return model.blocks(); },
          .stored_scores_bytes = roformer_scores_bytes<Options>,
          .check = check_roformer<Options>,
          .widest_tensor =
              [](const Options& model, double samples) {
                const int64_t width = std::max(3 * model.heads() * model.dim_head(), 4 * model.dim());
                return samples * static_cast<double>(band_count(model) * width) /
                       static_cast<double>(model.stft_hop_length());
              },
          .summary = roformer_summary<Options>};
}

}  // namespace headroom::inline v0::training::detail
