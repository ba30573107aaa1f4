#pragma once

#include <cstdint>
#include <string>

#include "headroom/models/htdemucs.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/model_rules.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/weights/tensor_map.hpp"

// What the registry has of HTDemucs.
namespace headroom::inline v0::training::detail {

inline void check_htdemucs(const models::HTDemucsOptions& model, const Config& config, Rules& rule) {
  check_options({"model"}, rule, [&] { with_sections(model, config).check(); });
}

/// Bytes of the attention scores of a forward pass, if attention stored them: by turns each stream with itself, and
/// each with the other one.
inline int64_t htdemucs_scores_bytes(const models::HTDemucsOptions& model, int64_t batch, int64_t samples) {
  const int64_t spectrum = model.frames(samples) * model.bins(model.depth()), waveform = model.steps(samples);
  const int64_t crossing = (model.t_layers() + model.t_cross_first()) / 2;
  const int64_t scores =
      (model.t_layers() - crossing) * (spectrum * spectrum + waveform * waveform) + crossing * 2 * spectrum * waveform;
  return batch * model.t_heads() * scores * static_cast<int64_t>(sizeof(float));
}

/// What names and shapes of weights tell, see ModelEntry::facts. What they do not have is 0.
inline Json htdemucs_facts(const weights::TensorMap& weights) {
  const WeightShapes shapes{weights};
  const int64_t depth = shapes.count("encoder."), channels = shapes.size("tencoder.0.conv.weight", 1);
  return {{"model.depth", depth},
          {"model.channels", shapes.size("encoder.0.conv.weight", 0)},
          {"model.kernel_size", shapes.size("encoder.0.conv.weight", 2)},
          {"model.bottom_channels", shapes.size("channel_upsampler.weight", 0)},
          {"model.t_layers", shapes.count("crosstransformer.layers.")},
          {"width of the feed-forward networks (model.t_hidden_scale)",
           shapes.size("crosstransformer.layers.0.linear1.weight", 0)},
          {"frequencies (model.nfft / 2 / model.stride)", shapes.size("freq_emb.embedding.weight", 0)},
          {"audio.channels", channels},
          {"number of stems (audio.stems)",
           channels > 0 ? shapes.size("tdecoder." + std::to_string(depth - 1) + ".conv_tr.bias", 0) / channels : 0}};
}

inline ModelEntry<models::HTDemucsOptions> htdemucs() {
  using Options = models::HTDemucsOptions;
  return {
      .make = [](const Options& model, const Config& config) { return models::HTDemucs(with_sections(model, config)); },
      .blocks = [](const Options& model) { return model.t_layers(); },
      .stored_scores_bytes = htdemucs_scores_bytes,
      .check = check_htdemucs,
      .widest_tensor =
          [](const Options& model, double samples) {
            return samples * static_cast<double>(4 * model.channels()) / static_cast<double>(model.stride());
          },
      .summary =
          [](const Options& model, int64_t samples) {
            return size_summary({model.t_layers(), model.bottom(), model.t_heads()}, model.frames(samples),
                                model.bins(model.depth()), "frequencies");
          },
      .facts = htdemucs_facts};
}

}  // namespace headroom::inline v0::training::detail
