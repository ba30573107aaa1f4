#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/model_rules.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/weights/tensor_map.hpp"

// What the registry has of BS-RoFormer and Mel-Band RoFormer.
namespace headroom::inline v0::training::detail {

inline const char* bands_key(const models::BsRoformerOptions&) { return "model.freqs_per_bands"; }
inline const char* bands_key(const models::MelBandRoformerOptions&) { return "model.num_bands"; }

template <class Options>
void check_roformer(const Options& model, const Config& config, Rules& rule) {
  rule(
      {"model.dim_head"}, [&] { return model.use_pope() || model.dim_head() % 2 == 0; }, "got ", model.dim_head(),
      ", expected an even number, for the rotary embedding");
  rule(
      {"model.time_sinks", "model.time_window"}, [&] { return model.time_window() > 0 || model.time_sinks() == 0; },
      "got ", model.time_sinks(), ", expected 0 or a model.time_window: without one all frames see all frames");
  rule(
      {"model.stft_win_length", "model.stft_n_fft"}, [&] { return model.stft_win_length() <= model.stft_n_fft(); },
      "got ", model.stft_win_length(), ", expected at most model.stft_n_fft, which is ", model.stft_n_fft());
  check_stft({{"model.stft_n_fft", model.stft_n_fft()},
              {"model.stft_hop_length", model.stft_hop_length()},
              {"model.stft_win_length", model.stft_win_length()}},
             config, rule);
  check_options({bands_key(model), "model.stft_n_fft"}, rule, [&] { with_sections(model, config).bands(); });
}

/// Bytes of the attention scores of a forward pass, if attention stored them.
template <class Options>
int64_t roformer_scores_bytes(const Options& model, int64_t batch, int64_t samples) {
  const int64_t frames = model.frames(samples), bands = model.band_count();
  const int64_t scores = model.time_transformer_depth() * bands * frames * frames +
                         model.freq_transformer_depth() * frames * bands * bands;
  return model.depth() * batch * model.heads() * scores * static_cast<int64_t>(sizeof(float));
}

/// What names and shapes of a RoFormer's weights tell, see ModelEntry::facts. What they do not have is 0.
inline Json roformer_facts(const weights::TensorMap& weights) {
  const WeightShapes shapes{weights};
  const int64_t transformers = shapes.count("layers.0.");
  const std::string time = "layers.0." + std::to_string(std::max<int64_t>(transformers - 2, 0)) + ".layers.";
  const std::string bands = "layers.0." + std::to_string(std::max<int64_t>(transformers - 1, 0)) + ".layers.";
  // Branches of the newer layout have their hyper-connections around them
  const std::string connection = time + "0.0.", branch = shapes.any(connection + "branch.") ? "branch." : "";
  const std::string mask = "mask_estimators.0.to_freqs.0.0.", attention = connection + branch;
  const std::string later =
      "layers.1." + std::to_string(std::max<int64_t>(transformers - 1, 0)) + ".layers.0.0." + branch;
  const bool mixes_values =
      shapes.any(later + "to_value_residual_mix.") || shapes.any(later + "learned_value_residual_mix.");
  const int64_t dim = shapes.size(attention + "to_out.0.weight", 0),
                heads = shapes.size(attention + "to_gates.weight", 0);
  int64_t linears = 0, input = 0;
  while (shapes.any(mask + std::to_string(2 * linears) + ".")) ++linears;
  const int64_t groups = shapes.count("band_split.to_features.");
  for (int64_t i = 0; i < groups; ++i)
    input += shapes.size("band_split.to_features." + std::to_string(i) + ".0.gamma", 0);
  return {
      {"model.type", weights.contains("final_norm.gamma") ? "bs_roformer" : "mel_band_roformer"},
      {"model.dim", dim},
      {"model.depth", shapes.count("layers.")},
      {"model.linear_transformer_depth", transformers > 2 ? shapes.count("layers.0.0.layers.") : 0},
      {"model.time_transformer_depth", shapes.count(time)},
      {"model.freq_transformer_depth", shapes.count(bands)},
      {"model.num_residual_streams",
       branch.empty() ? 0 : std::max<int64_t>(shapes.size(connection + "static_beta", 0), 1)},
      {"model.add_value_residual", static_cast<int64_t>(mixes_values)},
      {"model.use_pope", static_cast<int64_t>(shapes.any(attention + "pope_embed."))},
      {"model.heads", heads},
      {"model.dim_head", shapes.size(attention + "to_out.0.weight", 1) / std::max<int64_t>(heads, 1)},
      {"number of bands (model.freqs_per_bands or num_bands)", groups},
      {"numbers in all bands (those, and audio.channels or model.stereo)", input},
      {"linear layers of a mask (model.mask_estimator_depth)", linears},
      {"model.mlp_expansion_factor", linears > 1 ? shapes.size(mask + "0.weight", 0) / std::max<int64_t>(dim, 1) : 0},
      {"number of stems (audio.stems, or model.num_stems with training.instruments)",
       shapes.count("mask_estimators.")}};
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
              },
          .facts = roformer_facts};
}

}  // namespace headroom::inline v0::training::detail
