#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/checkpoint/stack.hpp"
#include "headroom/core/error.hpp"
#include "headroom/models/htdemucs/convolution.hpp"
#include "headroom/models/htdemucs/layers.hpp"
#include "headroom/models/htdemucs/options.hpp"
#include "headroom/models/htdemucs/spectrum.hpp"
#include "headroom/nn/cross_transformer.hpp"

namespace headroom::inline v0::models {

namespace detail {

/// What was taken out of a signal before a branch, to be put back behind it.
struct SignalLevel {
  torch::Tensor mean, deviation;  // [B,1,1(,1)]

  static SignalLevel of(const torch::Tensor& x) {  // [B,C,S] or [B,C,F,T]
    std::vector<int64_t> axes;
    for (int64_t d = 1; d < x.dim(); ++d) axes.push_back(d);
    const bool unbiased = x.numel() > x.size(0);  // of a single number it would be NaN
    return {x.mean(axes, /*keepdim=*/true), x.std(axes, unbiased, /*keepdim=*/true)};
  }
  torch::Tensor taken_from(const torch::Tensor& x) const { return (x - mean) / (1e-5 + deviation); }
  /// stems [B,N,…]
  torch::Tensor put_back(const torch::Tensor& stems) const {
    return stems * deviation.unsqueeze(1) + mean.unsqueeze(1);
  }
};

/// A learned vector of each frequency. Its parameter is embedding.weight.
class FrequencyVectorsImpl : public torch::nn::Module {
 public:
  FrequencyVectorsImpl(int64_t bins, int64_t channels, const HTDemucsOptions& options)
      : factor_(options.freq_emb() * options.emb_scale()), embedding_(bins, channels) {
    const torch::NoGradGuard guard;
    register_module("embedding", embedding_);
    torch::Tensor& weight = embedding_->weight;
    if (options.emb_smooth()) {
      const torch::Tensor count = torch::arange(1, bins + 1, weight.options().requires_grad(false));
      weight.copy_(weight.cumsum(0) / count.sqrt().unsqueeze(1));
    }
    weight.div_(options.emb_scale());
  }

  /// x [B,C,F,T] -> same shape
  torch::Tensor forward(const torch::Tensor& x) { return x + factor_ * embedding_->weight.t().unsqueeze(-1); }

 private:
  double factor_;
  torch::nn::Embedding embedding_;
};
TORCH_MODULE(FrequencyVectors);

/// An encoder and the decoder that mirrors it, of spectra or of waveforms.
struct HTDemucsBranch {
  std::vector<HTDemucsEncoderLayer> encoder;
  std::vector<HTDemucsDecoderLayer> decoder;  // that of the innermost place first
  FrequencyVectors frequencies{nullptr};      // of spectra, behind the first layer

  /// What the layers of the encoder were given (its steps) and gave.
  struct Skips {
    std::vector<int64_t> lengths;
    std::vector<torch::Tensor> outputs;
  };

  Skips encode(torch::Tensor x, const CheckpointPolicy& policy) const {
    Skips skips;
    for (const HTDemucsEncoderLayer& layer : encoder) {
      skips.lengths.push_back(x.size(2));
      x = run_under(
          policy, [layer = layer.ptr()](const torch::Tensor& t) { return layer->forward(t); }, x);
      if (skips.outputs.empty() && !frequencies.is_empty()) x = FrequencyVectors(frequencies)->forward(x);
      skips.outputs.push_back(x);
    }
    return skips;
  }

  torch::Tensor decode(torch::Tensor x, Skips skips, const CheckpointPolicy& policy) const {
    for (const HTDemucsDecoderLayer& layer : decoder) {
      const auto forward = [layer = layer.ptr(), length = skips.lengths.back()](const torch::Tensor& t,
                                                                                const torch::Tensor& skip) {
        return layer->forward(t, skip, length);
      };
      x = run_under(policy, forward, x, skips.outputs.back());
      skips.lengths.pop_back();
      skips.outputs.pop_back();
    }
    return x;
  }
};

}  // namespace detail

/// HTDemucs (Rouard et al. 2023, arXiv:2211.08553) with the names of parameters of demucs' checkpoints: an encoder and
/// a decoder of the complex spectrum, as channels, and of the waveform; between them a transformer over both. The stems
/// are the sum of what both branches give. What demucs' options ask for and the published models do not have is not
/// here: masks, Wiener filters, branches that merge, other position embeddings, sparse attention.
class HTDemucsImpl : public torch::nn::Module {
 public:
  /// Throws headroom.models.options.
  explicit HTDemucsImpl(const HTDemucsOptions& options) : options(options), spectrum_(checked(options).nfft()) {
    const auto& o = options;
    encoder = register_module("encoder", torch::nn::ModuleList());
    decoder = register_module("decoder", torch::nn::ModuleList());
    tencoder = register_module("tencoder", torch::nn::ModuleList());
    tdecoder = register_module("tdecoder", torch::nn::ModuleList());
    add_layers(of_spectrum_, 2 * o.audio_channels(), *encoder, *decoder);
    add_layers(of_waveform_, o.audio_channels(), *tencoder, *tdecoder);
    if (o.freq_emb() > 0) {
      of_spectrum_.frequencies =
          register_module("freq_emb", detail::FrequencyVectors(o.bins(1), o.channels(), options));
    }
    if (o.rescale() > 0) rescale();
    if (o.bottom_channels() > 0) {
      const auto resampler = [&](const char* name, int64_t in, int64_t out) {
        return register_module(name, Convolution(ConvolutionOptions(in, out, {1})));
      };
      const int64_t width = o.width(o.depth() - 1), bottom = o.bottom_channels();
      channel_upsampler = resampler("channel_upsampler", width, bottom);
      channel_downsampler = resampler("channel_downsampler", bottom, width);
      channel_upsampler_t = resampler("channel_upsampler_t", width, bottom);
      channel_downsampler_t = resampler("channel_downsampler_t", bottom, width);
    }
    if (o.t_layers() > 0)
      crosstransformer = register_module("crosstransformer", nn::CrossTransformer(transformer_options()));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::models::HTDemucs(channels=" << options.channels() << ", depth=" << options.depth()
           << ", nfft=" << options.nfft() << ", bottom_channels=" << options.bottom_channels()
           << ", t_layers=" << options.t_layers() << ", stems=" << options.stems() << ")";
  }

  /// mixture [B,C,S] -> stems [B,N,C,S]. Throws headroom.models.mixture.
  torch::Tensor forward(const torch::Tensor& mixture) {
    require(mixture.dim() == 3 && mixture.size(1) == options.audio_channels() && mixture.size(2) > 0,
            "headroom.models.mixture", "mixture is ", mixture.sizes(), ", expected [B,", options.audio_channels(),
            ",S]");
    const int64_t samples = mixture.size(2), missing = options.segment() - samples;
    if (is_training() || !options.use_train_segment() || missing <= 0) return separate(mixture);
    return separate(torch::constant_pad_nd(mixture, {0, missing})).narrow(-1, 0, samples);
  }

  HTDemucsOptions options;
  torch::nn::ModuleList encoder{nullptr}, decoder{nullptr};    // of the spectrum
  torch::nn::ModuleList tencoder{nullptr}, tdecoder{nullptr};  // of the waveform
  Convolution channel_upsampler{nullptr}, channel_downsampler{nullptr};
  Convolution channel_upsampler_t{nullptr}, channel_downsampler_t{nullptr};
  nn::CrossTransformer crosstransformer{nullptr};

 private:
  static HTDemucsOptions checked(HTDemucsOptions options) {
    options.check();
    return options;
  }

  void add_layers(detail::HTDemucsBranch& branch, int64_t channels, torch::nn::ModuleListImpl& encoders,
                  torch::nn::ModuleListImpl& decoders) const {
    const bool spectrum = &branch == &of_spectrum_;
    for (int64_t i = 0; i < options.depth(); ++i) {
      const int64_t inner = options.width(i), outer = i == 0 ? channels : options.width(i - 1);
      branch.encoder.emplace_back(options, HTDemucsPlace{i, spectrum, outer, inner});
      branch.decoder.emplace(branch.decoder.begin(), options,
                             HTDemucsPlace{i, spectrum, i == 0 ? channels * options.stems() : outer, inner});
    }
    for (const auto& layer : branch.encoder) encoders.push_back(layer.ptr());
    for (const auto& layer : branch.decoder) decoders.push_back(layer.ptr());
  }

  /// Divides weights and biases of all convolutions by the root of their deviation over the option's.
  void rescale() {
    const torch::NoGradGuard guard;
    for (const auto& module : modules(/*include_self=*/false)) {
      auto* const convolution = module->as<Convolution>();
      if (convolution == nullptr) continue;
      const torch::Tensor factor = (convolution->weight.std() / options.rescale()).sqrt();
      convolution->weight.div_(factor);
      convolution->bias.div_(factor);
    }
  }

  nn::CrossTransformerOptions transformer_options() const {
    const auto& o = options;
    const int64_t dim = o.bottom();
    return nn::CrossTransformerOptions(dim, o.t_heads(), o.t_layers())
        .layer(nn::CrossTransformerLayerOptions(dim, o.t_heads())
                   .hidden(static_cast<int64_t>(static_cast<double>(dim) * o.t_hidden_scale()))
                   .gelu(o.t_gelu())
                   .dropout(o.t_dropout())
                   .norm_first(o.t_norm_first())
                   .group_norm(o.t_group_norm())
                   .norm_out(o.t_norm_out())
                   .layer_scale(o.t_layer_scale())
                   .attention(o.attention()))
        .cross_first(o.t_cross_first())
        .norm_in(o.t_norm_in())
        .norm_in_group(o.t_norm_in_group())
        .max_period(o.t_max_period())
        .position_weight(o.t_weight_pos_embed())
        .gradient_checkpointing(o.gradient_checkpointing());
  }

  /// mixture [B,C,S] -> stems [B,N,C,S]
  torch::Tensor separate(const torch::Tensor& mixture) {
    const CheckpointPolicy& policy = options.gradient_checkpointing().rest;
    const torch::Tensor spectrum = spectrum_.forward(mixture);  // [B,2·C,F,T]
    const auto level = detail::SignalLevel::of(spectrum), level_t = detail::SignalLevel::of(mixture);
    auto skips = of_spectrum_.encode(level.taken_from(spectrum), policy);
    auto skips_t = of_waveform_.encode(level_t.taken_from(mixture), policy);
    torch::Tensor x = skips.outputs.back(), xt = skips_t.outputs.back();  // [B,width,F',T], [B,width,S']
    transform(x, xt);
    x = of_spectrum_.decode(x, std::move(skips), policy);
    xt = of_waveform_.decode(xt, std::move(skips_t), policy);
    const torch::Tensor stems = level.put_back(x.unflatten(1, {options.stems(), -1}));  // [B,N,2·C,F,T]
    return level_t.put_back(xt.unflatten(1, {options.stems(), -1})) + spectrum_.inverse(stems, mixture.size(2));
  }

  /// Both streams through the transformer, between changes of their width.
  void transform(torch::Tensor& x, torch::Tensor& xt) {
    if (crosstransformer.is_empty()) return;
    const auto resized = [](Convolution& to, const torch::Tensor& t) {  // [B,C,F,T]
      return to->forward(t.flatten(2)).unflatten(2, {t.size(2), t.size(3)});
    };
    if (!channel_upsampler.is_empty()) {
      x = resized(channel_upsampler, x);
      xt = channel_upsampler_t->forward(xt);
    }
    std::tie(x, xt) = crosstransformer->forward(x, xt);
    if (channel_downsampler.is_empty()) return;
    x = resized(channel_downsampler, x);
    xt = channel_downsampler_t->forward(xt);
  }

  DemucsSpectrum spectrum_;
  detail::HTDemucsBranch of_spectrum_, of_waveform_;
};
TORCH_MODULE(HTDemucs);

}  // namespace headroom::inline v0::models
