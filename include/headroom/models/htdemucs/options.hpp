#pragma once

#include <torch/arg.h>

#include <cmath>
#include <cstdint>

#include "headroom/attention/options.hpp"
#include "headroom/checkpoint/policy.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::models {

/// Options of HTDemucs, named as in the published checkpoints, with demucs' defaults.
struct HTDemucsOptions {
  /// Channels of the outermost layers; those further in have `growth` times as many each.
  TORCH_ARG(int64_t, channels) = 48;
  TORCH_ARG(int64_t, growth) = 2;
  /// Size of the STFT, samples; frames are a quarter of it apart.
  TORCH_ARG(int64_t, nfft) = 4096;
  /// Encoder layers, and decoder layers, of each branch.
  TORCH_ARG(int64_t, depth) = 4;
  /// A convolution and a gated linear unit at the end of each encoder layer and the start of each decoder layer.
  TORCH_ARG(bool, rewrite) = true;
  /// Weight of the learned vector of each frequency behind the first layer; 0: none.
  TORCH_ARG(double, freq_emb) = 0.2;
  /// The vectors are stored so many times smaller than they are used.
  TORCH_ARG(double, emb_scale) = 10;
  /// Vectors of neighbouring frequencies start alike.
  TORCH_ARG(bool, emb_smooth) = true;
  /// Of convolutions along frequency and time, twice the stride.
  TORCH_ARG(int64_t, kernel_size) = 8;
  TORCH_ARG(int64_t, stride) = 4;
  /// Neighbours on either side that the `rewrite` convolutions of decoder and encoder see.
  TORCH_ARG(int64_t, context) = 1;
  TORCH_ARG(int64_t, context_enc) = 0;
  /// Layers from this one on have group norms, of so many groups.
  TORCH_ARG(int64_t, norm_starts) = 4;
  TORCH_ARG(int64_t, norm_groups) = 4;
  /// Residual branches of dilated convolutions: 0 none, 1 in the encoder, 2 in the decoder, 3 in both.
  TORCH_ARG(int64_t, dconv_mode) = 1;
  /// Layers of such a branch, how many times fewer channels they have, and their factor at first.
  TORCH_ARG(int64_t, dconv_depth) = 2;
  TORCH_ARG(int64_t, dconv_comp) = 8;
  TORCH_ARG(double, dconv_init) = 1e-3;
  /// Width of the transformer; 0: as the last encoder layer.
  TORCH_ARG(int64_t, bottom_channels) = 0;
  /// The transformer, see nn::CrossTransformerOptions; no layers: none.
  TORCH_ARG(int64_t, t_layers) = 5;
  TORCH_ARG(double, t_hidden_scale) = 4;
  TORCH_ARG(int64_t, t_heads) = 8;
  TORCH_ARG(double, t_dropout) = 0;
  TORCH_ARG(bool, t_norm_in) = true;
  TORCH_ARG(bool, t_norm_in_group) = false;
  TORCH_ARG(bool, t_group_norm) = false;
  TORCH_ARG(bool, t_norm_first) = true;
  TORCH_ARG(bool, t_norm_out) = true;
  TORCH_ARG(double, t_max_period) = 10000;
  TORCH_ARG(bool, t_layer_scale) = true;
  TORCH_ARG(bool, t_gelu) = true;
  TORCH_ARG(double, t_weight_pos_embed) = 1;
  TORCH_ARG(bool, t_cross_first) = false;
  /// Convolutions start with weights of about this deviation; 0: with LibTorch's.
  TORCH_ARG(double, rescale) = 0.1;
  /// In evaluation a mixture shorter than `segment` is filled up with silence, as it was trained.
  TORCH_ARG(bool, use_train_segment) = true;
  /// Samples of a training example.
  TORCH_ARG(int64_t, segment) = 441000;
  /// Channels of the mixture and of each stem.
  TORCH_ARG(int64_t, audio_channels) = 2;
  TORCH_ARG(int64_t, stems) = 4;
  /// What is kept for the backward pass, block by block of the transformer; true: their inputs, the rest is computed
  /// again. Layers of encoders and decoders are computed again where the last block is.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
  TORCH_ARG(AttentionBackend, attention) = AttentionBackend::automatic;

 public:
  /// Samples between frames.
  int64_t hop() const { return nfft_ / 4; }
  /// Frames of so many samples.
  int64_t frames(int64_t samples) const { return (samples + hop() - 1) / hop(); }
  /// Channels behind encoder layer `index`.
  int64_t width(int64_t index) const { return index == 0 ? channels_ : growth_ * width(index - 1); }
  /// Frequencies in front of encoder layer `index`.
  int64_t bins(int64_t index) const { return index == 0 ? nfft_ / 2 : bins(index - 1) / stride_; }
  /// Features of a token of the transformer.
  int64_t bottom() const { return bottom_channels_ > 0 ? bottom_channels_ : width(depth_ - 1); }
  /// Steps of the waveform that the transformer sees.
  int64_t steps(int64_t samples) const {
    for (int64_t i = 0; i < depth_; ++i) samples = (samples + stride_ - 1) / stride_;
    return samples;
  }

  /// Throws headroom.models.options.
  void check() const {
    static constexpr auto kId = "headroom.models.options";
    require(channels_ > 0 && growth_ > 0 && depth_ > 0 && depth_ <= kDeepest && audio_channels_ > 0 && stems_ > 0, kId,
            "channels ", channels_, ", growth ", growth_, ", depth ", depth_, ", audio channels ", audio_channels_,
            ", stems ", stems_, "; expected positive numbers, and a depth of at most ", kDeepest);
    const double widest = static_cast<double>(channels_) * std::pow(growth_, depth_ - 1);
    require(widest <= kWidest, kId, "the last of ", depth_, " layers has ", widest, " channels, expected at most ",
            kWidest, ": lower depth or growth");
    require(stride_ > 0 && stride_ % 2 == 0 && kernel_size_ == 2 * stride_, kId, "kernel_size is ", kernel_size_,
            " and stride ", stride_, ", expected an even stride and a kernel of twice that");
    bool divides = nfft_ % 8 == 0;
    for (int64_t i = 0; i < depth_; ++i) divides = divides && bins(i) % stride_ == 0;
    require(divides && bins(depth_ - 1) > kernel_size_, kId, "nfft is ", nfft_, ", of which layer ", depth_ - 1,
            " gets ", bins(depth_ - 1), " frequencies; expected more than kernel_size, ", kernel_size_,
            ", and that the stride ", stride_, " divides those of each layer: a smaller depth, or another nfft");
    // The norms of a decoder layer have the channels of the layer around it, too
    require(norm_starts_ >= depth_ ||
                (norm_starts_ >= 0 && norm_groups_ > 0 && width(norm_starts_) % norm_groups_ == 0 &&
                 (norm_starts_ > 0 ? width(norm_starts_ - 1) : audio_channels_ * stems_) % norm_groups_ == 0),
            kId, "norm_groups is ", norm_groups_, " and norm_starts ", norm_starts_,
            ", expected a divisor of the channels of each layer from norm_starts on, and of the one around it");
    require(dconv_mode_ == 0 || (dconv_comp_ > 0 && channels_ >= dconv_comp_), kId, "dconv_comp is ", dconv_comp_,
            ", expected at most channels, ", channels_);
    require(t_layers_ == 0 || (t_heads_ > 0 && bottom() % t_heads_ == 0 && bottom() % 4 == 0), kId,
            "a transformer of width ", bottom(), " and t_heads ", t_heads_,
            ", expected a width that both 4 and t_heads divide");
    require(t_layers_ == 0 || static_cast<double>(bottom()) * t_hidden_scale_ >= 1, kId, "t_hidden_scale ",
            t_hidden_scale_, " of a transformer of width ", bottom(), " leaves its feed-forward networks no features");
  }

  /// The options that say which model it is, as a configuration names them.
  static void describe(auto& self, auto&& field) {
    const auto count = [&](const char* name, auto& value, double least, double most, const char* meaning) {
      field(name, value, {.at_least = least, .at_most = most, .bound = true}, meaning);
    };
    const auto choice = [&](const char* name, auto& value, const char* meaning) {
      field(name, value, {.bound = true}, meaning);
    };
    count("channels", self.channels(), 1, kWidest, "of the outermost layers");
    count("growth", self.growth(), 1, 16, "how many times more channels each layer has than the one around it");
    count("nfft", self.nfft(), 16, kWidest, "STFT size, samples; frames are a quarter of it apart");
    count("depth", self.depth(), 1, kDeepest, "layers of each encoder and decoder");
    choice("rewrite", self.rewrite(), "a further convolution in each layer, with a gated linear unit");
    count("freq_emb", self.freq_emb(), 0, kWidest, "weight of the learned vectors of frequencies; 0: none");
    field("emb_scale", self.emb_scale(), {.at_most = kWidest, .above = 0, .bound = true},
          "how many times smaller they are stored than used");
    choice("emb_smooth", self.emb_smooth(), "those of neighbouring frequencies start alike");
    count("kernel_size", self.kernel_size(), 4, 1024, "of convolutions along frequency and time, twice the stride");
    count("stride", self.stride(), 2, 512, "of these, even");
    count("context", self.context(), 0, 64, "neighbours on either side that `rewrite` sees in decoders");
    count("context_enc", self.context_enc(), 0, 64, "and in encoders");
    count("norm_starts", self.norm_starts(), 0, 100, "first layer with group norms");
    count("norm_groups", self.norm_groups(), 1, kWidest, "groups of these");
    count("dconv_mode", self.dconv_mode(), 0, 3, "dilated residual branches: 1 in encoders, 2 in decoders, 3 in both");
    count("dconv_depth", self.dconv_depth(), 0, 20, "layers of such a branch");
    count("dconv_comp", self.dconv_comp(), 1, kWidest, "how many times fewer channels it has");
    field("dconv_init", self.dconv_init(), {.at_least = 0, .at_most = 1}, "its factor at first");
    describe_transformer(self, field);
    field("rescale", self.rescale(), {.at_least = 0, .at_most = 1000},
          "deviation that weights of convolutions start with, about; 0: LibTorch's");
    choice("use_train_segment", self.use_train_segment(),
           "shorter segments are filled up with silence to training.segment_length when the model separates");
  }

 private:
  static constexpr double kWidest = 1 << 20;
  static constexpr int64_t kDeepest = 16;

  static void describe_transformer(auto& self, auto&& field) {
    const auto choice = [&](const char* name, auto& value, const char* meaning) {
      field(name, value, {.bound = true}, meaning);
    };
    field("bottom_channels", self.bottom_channels(), {.at_least = 0, .at_most = kWidest, .bound = true},
          "width of the transformer; 0: as the last encoder layer");
    field("t_layers", self.t_layers(), {.at_least = 0, .at_most = 1000, .bound = true},
          "its layers in each stream; 0: no transformer");
    field("t_hidden_scale", self.t_hidden_scale(), {.at_most = 1000, .above = 0, .bound = true},
          "width of its feed-forward networks, as a multiple of its own");
    field("t_heads", self.t_heads(), {.at_least = 1, .at_most = kWidest, .bound = true}, "attention heads");
    field("t_dropout", self.t_dropout(), {.at_least = 0, .below = 1}, "of the transformer, while training");
    choice("t_norm_in", self.t_norm_in(), "a norm of each token before positions are added");
    choice("t_norm_in_group", self.t_norm_in_group(), "without it, one over all tokens");
    choice("t_group_norm", self.t_group_norm(), "norms of the layers are over all tokens");
    choice("t_norm_first", self.t_norm_first(), "norms before the branches of a layer, else behind");
    choice("t_norm_out", self.t_norm_out(), "with t_norm_first, one over all tokens at the end of each layer");
    field("t_max_period", self.t_max_period(), {.at_most = 1e12, .above = 1, .bound = true},
          "longest period of the sines that tell positions");
    choice("t_layer_scale", self.t_layer_scale(), "learned factors of the branches");
    choice("t_gelu", self.t_gelu(), "GELU in feed-forward networks, else ReLU");
    field("t_weight_pos_embed", self.t_weight_pos_embed(), {.at_least = -1e6, .at_most = 1e6, .bound = true},
          "factor of the positions");
    choice("t_cross_first", self.t_cross_first(), "the first layer has cross attention");
  }
};

}  // namespace headroom::inline v0::models
