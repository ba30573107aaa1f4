#pragma once

#include <algorithm>
#include <any>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headroom/audio/losses.hpp"
#include "headroom/core/error.hpp"
#include "headroom/models/bs_roformer.hpp"
#include "headroom/models/mel_band_roformer.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/htdemucs.hpp"
#include "headroom/training/model_rules.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/roformers.hpp"
#include "headroom/training/rules.hpp"
#include "headroom/training/sections.hpp"
#include "headroom/training/separate.hpp"

namespace headroom::inline v0::training {

/// The options of the time-frequency transformer that a configuration describes. Throws headroom.training.model_options
/// for another model.
inline models::TimeFrequencyTransformerOptions model_options(const Config& config) {
  return detail::with_sections(config.model.as<models::TimeFrequencyTransformerOptions>(), config);
}

/// The loss that the section `loss` describes.
inline audio::SeparationLoss make_loss(const Config& config) {
  const LossConfig& loss = config.loss;
  return audio::SeparationLoss(
      audio::SeparationLossOptions()
          .l1_weight(loss.l1_weight)
          .mse_weight(loss.mse_weight)
          .masked_weight(loss.masked_weight)
          .masked_quantile(loss.masked_quantile)
          .masked_by_example(loss.masked_by_example)
          .stft_weight(loss.stft_weight)
          .stft(audio::MultiResolutionStftLossOptions().windows(loss.windows).hop(loss.hop).min_n_fft(loss.min_n_fft))
          .log_wmse_weight(loss.log_wmse_weight)
          .sample_rate(static_cast<double>(config.audio.sample_rate))
          .frequency_weight(loss.frequency_weight));
}

/// The loss that the model of a configuration is trained with: its own, or that of the section `loss`.
HEADROOM_TRAINING Loss loss_of(const Config& config);

/// The model of a configuration, on the CPU, with parameters drawn from LibTorch's generator of random numbers.
inline models::Separator make_model(const Config& config) {
  return config.model.entry().make(config.model.options(), config);
}

/// Bytes of the attention scores of a forward pass over a batch, if attention stored them; none for a model without
/// attention.
inline std::optional<int64_t> stored_scores_bytes(const Config& config) {
  const auto& bytes = config.model.entry().stored_scores_bytes;
  if (!bytes) return std::nullopt;
  return bytes(config.model.options(), config.training.batch_size, config.training.segment_length);
}

/// All keys of a type of model as a Markdown table, see describe_markdown. Throws headroom.training.model_type.
inline std::string model_table(const std::string& type) { return describe_markdown(ModelConfig(type), "model"); }

HEADROOM_TRAINING std::map<std::string, ModelType>& model_types();

/// What is wrong with the name of a type of model; nothing when there is one of this name.
HEADROOM_TRAINING std::string why_no_model_type(const std::string& name);

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

inline void check_time_frequency_transformer(const models::TimeFrequencyTransformerOptions& model, const Config& config,
                                             Rules& rule) {
  const int64_t heads = model.n_heads(), width = model.emb_dim();
  rule(
      {"model.n_heads", "model.emb_dim"}, [&] { return width % heads == 0; }, "got ", heads,
      ", expected a divisor of model.emb_dim, which is ", width);
  rule(
      {"model.n_heads", "model.emb_dim"}, [&] { return width % heads != 0 || width / heads % 2 == 0; }, "got ", heads,
      ", expected an even head dimension for the rotary embedding, emb_dim ", width, " / ", heads, " heads is odd");
  rule(
      {"model.reversible", "model.gradient_checkpointing"},
      [&] { return !model.reversible() || config.model.gradient_checkpointing == StackPolicy(); },
      "got true, expected false or no model.gradient_checkpointing, which has nothing to store there");
  check_stft({{"model.n_fft", model.n_fft()}, {"model.hop_length", model.hop_length()}, {"model.n_fft", model.n_fft()}},
             config, rule);
}

inline ModelEntry<models::TimeFrequencyTransformerOptions> time_frequency_transformer() {
  using Options = models::TimeFrequencyTransformerOptions;
  return {.make = [](const Options&,
                     const Config& config) { return models::TimeFrequencyTransformer(model_options(config)); },
          .blocks = [](const Options& model) { return model.reversible() ? 0 : model.blocks(); },
          .stored_scores_bytes = models::stored_scores_bytes,
          .check = check_time_frequency_transformer,
          .widest_tensor =
              [](const Options& model, double samples) {
                const int64_t width = std::max(3 * model.emb_dim(), std::ranges::max(model.ffn_hidden_dim()));
                return samples * static_cast<double>(model.bins() * width) / static_cast<double>(model.hop_length());
              },
          .summary =
              [](const Options& model, int64_t samples) {
                return size_summary({model.n_layers(), model.emb_dim(), model.n_heads()}, model.frames(samples),
                                    model.bins(), "bins");
              }};
}

}  // namespace detail

HEADROOM_TRAINING std::map<std::string, ModelType>& model_types() {
  static std::map<std::string, ModelType> types = {
      {"bs_roformer", detail::erased(detail::roformer<models::BsRoformer, models::BsRoformerOptions>())},
      {"htdemucs", detail::erased(detail::htdemucs())},
      {"mel_band_roformer",
       detail::erased(detail::roformer<models::MelBandRoformer, models::MelBandRoformerOptions>())},
      {"time_frequency_transformer", detail::erased(detail::time_frequency_transformer())},
  };
  return types;
}

HEADROOM_TRAINING std::string why_no_model_type(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& [known, type] : model_types()) names.push_back(known);
  if (model_types().contains(name)) return "";
  return "got " + detail::given_text(name) + ", expected " + detail::one_of(names) + did_you_mean(name, names);
}

HEADROOM_TRAINING const ModelType& find_model(const std::string& name) {
  const std::string reason = why_no_model_type(name);
  require(reason.empty(), "headroom.training.model_type", reason);
  return model_types().at(name);
}

HEADROOM_TRAINING Loss loss_of(const Config& config) {
  const ModelEntry<std::any>& entry = config.model.entry();
  if (entry.loss) return entry.loss(config.model.options(), config);
  return [loss = make_loss(config)](const torch::Tensor& estimate, const torch::Tensor& stems,
                                    const torch::Tensor& mixture) mutable {
    return loss->forward(estimate, stems, mixture);
  };
}
#endif

}  // namespace headroom::inline v0::training
