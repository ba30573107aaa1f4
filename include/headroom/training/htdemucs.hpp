#pragma once

#include <cstdint>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/models/htdemucs.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/model_rules.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/weights/tensor_map.hpp"

// What the registry has of HTDemucs.
namespace headroom::inline v0::training::detail {

/// A model's options with what other sections of a configuration say.
inline models::HTDemucsOptions with_sections(models::HTDemucsOptions model, const Config& config) {
  return model.audio_channels(config.audio.channels)
      .stems(static_cast<int64_t>(config.audio.stems.size()))
      .segment(config.training.segment_length)
      .gradient_checkpointing(config.model.gradient_checkpointing)
      .attention(attention_backend(config.model.attention));
}

inline void check_htdemucs(const models::HTDemucsOptions& model, const Config& config, Rules& rule) {
  std::string reason;
  try {
    if (!rule.any_wrong_in("model")) with_sections(model, config).check();
  } catch (const Error& error) {
    reason = error.what();
  }
  rule(
      {"model"}, [&] { return reason.empty(); }, reason);
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
  const auto count = [&](const std::string& prefix) {
    int64_t number = 0;
    while (true) {
      const std::string next = prefix + std::to_string(number) + ".";
      const auto found = weights.lower_bound(next);
      if (found == weights.end() || !found->first.starts_with(next)) return number;
      ++number;
    }
  };
  const auto size = [&](const std::string& name, int64_t axis) {
    const auto found = weights.find(name);
    return found != weights.end() && found->second.dim() > axis ? found->second.size(axis) : 0;
  };
  const int64_t depth = count("encoder."), channels = size("tencoder.0.conv.weight", 1);
  return {{"model.depth", depth},
          {"model.channels", size("encoder.0.conv.weight", 0)},
          {"model.kernel_size", size("encoder.0.conv.weight", 2)},
          {"model.bottom_channels", size("channel_upsampler.weight", 0)},
          {"model.t_layers", count("crosstransformer.layers.")},
          {"width of the feed-forward networks (model.t_hidden_scale)",
           size("crosstransformer.layers.0.linear1.weight", 0)},
          {"frequencies (model.nfft / 2 / model.stride)", size("freq_emb.embedding.weight", 0)},
          {"audio.channels", channels},
          {"number of stems (audio.stems)",
           channels > 0 ? size("tdecoder." + std::to_string(depth - 1) + ".conv_tr.bias", 0) / channels : 0}};
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
