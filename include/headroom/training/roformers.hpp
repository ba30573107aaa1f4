#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/training/model_rules.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"

// What the registry has of BS-RoFormer and Mel-Band RoFormer.
namespace headroom::inline v0::training::detail {

inline const char* bands_key(const models::BsRoformerOptions&) { return "model.freqs_per_bands"; }
inline const char* bands_key(const models::MelBandRoformerOptions&) { return "model.num_bands"; }

template <class Options>
void check_roformer(const Options& model, const Config& config, Rules& rule) {
  rule(
      {"model.dim_head"}, [&] { return model.dim_head() % 2 == 0; }, "got ", model.dim_head(),
      ", expected an even number, for the rotary embedding");
  rule(
      {"model.stft_win_length", "model.stft_n_fft"}, [&] { return model.stft_win_length() <= model.stft_n_fft(); },
      "got ", model.stft_win_length(), ", expected at most model.stft_n_fft, which is ", model.stft_n_fft());
  check_stft({{"model.stft_n_fft", model.stft_n_fft()},
              {"model.stft_hop_length", model.stft_hop_length()},
              {"model.stft_win_length", model.stft_win_length()}},
             config, rule);
  std::string reason;
  try {
    if (!rule.any_wrong_in("model")) with_sections(model, config).bands();
  } catch (const Error& error) {
    reason = error.what();
  }
  rule(
      {bands_key(model), "model.stft_n_fft"}, [&] { return reason.empty(); }, reason);
}

/// Bytes of the attention scores of a forward pass, if attention stored them.
template <class Options>
int64_t roformer_scores_bytes(const Options& model, int64_t batch, int64_t samples) {
  const int64_t frames = model.frames(samples), bands = model.band_count();
  const int64_t scores = model.time_transformer_depth() * bands * frames * frames +
                         model.freq_transformer_depth() * frames * bands * bands;
  return model.depth() * batch * model.heads() * scores * static_cast<int64_t>(sizeof(float));
}

template <class Model, class Options>
ModelEntry<Options> roformer() {
  return {.make = [](const Options& model, const Config& config) { return Model(with_sections(model, config)); },
          .blocks = [](const Options& model) { return model.blocks(); },
          .stored_scores_bytes = roformer_scores_bytes<Options>,
          .check = check_roformer<Options>,
          .widest_tensor =
              [](const Options& model, double samples) {
                const int64_t width = std::max(3 * model.heads() * model.dim_head(), 4 * model.dim());
                return samples * static_cast<double>(model.band_count() * width) /
                       static_cast<double>(model.stft_hop_length());
              },
          .summary =
              [](const Options& model, int64_t samples) {
                return size_summary({model.depth(), model.dim(), model.heads()}, model.frames(samples),
                                    model.band_count(), "bands");
              }};
}

}  // namespace headroom::inline v0::training::detail
