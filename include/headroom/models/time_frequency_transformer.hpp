#pragma once

#include <cstdint>
#include <vector>

#include "headroom/audio/stft.hpp"
#include "headroom/nn.hpp"

namespace headroom::inline v0::models {

/// Options of TimeFrequencyTransformer, named as in a configuration.
struct TimeFrequencyTransformerOptions {
  /// Size of the STFT and of its Hann window, samples.
  TORCH_ARG(int64_t, n_fft) = 4096;
  /// Samples between frames.
  TORCH_ARG(int64_t, hop_length) = 1024;
  /// Encoder layers, each of a block along frequency and one along time.
  TORCH_ARG(int64_t, n_layers) = 8;
  /// Features of a token, a multiple of 2·n_heads.
  TORCH_ARG(int64_t, emb_dim) = 192;
  /// Attention heads.
  TORCH_ARG(int64_t, n_heads) = 12;
  /// Hidden widths of the feed-forward networks.
  TORCH_ARG(std::vector<int64_t>, ffn_hidden_dim) = {768, 768};
  /// Channels of the mixture and of each stem.
  TORCH_ARG(int64_t, channels) = 2;
  TORCH_ARG(int64_t, stems) = 4;
  /// What of the blocks is kept for the backward pass; true: the input of each block, the rest is computed again.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
  /// Two streams through the encoder, from which backward computes all activations back: see nn::EncoderOptions.
  TORCH_ARG(bool, reversible) = false;
  TORCH_ARG(AttentionBackend, attention) = AttentionBackend::automatic;

 public:
  /// Frequencies of a frame.
  int64_t bins() const { return n_fft_ / 2 + 1; }
  /// Frames of so many samples.
  int64_t frames(int64_t samples) const { return 1 + samples / hop_length_; }
  /// Encoder blocks, in the order in which they run: each layer has one along frequency and one along time.
  int64_t blocks() const { return 2 * n_layers_; }

  /// The options that say which model it is, as a configuration names them.
  static void describe(auto& self, auto&& field) {
    constexpr double kWidest = 1 << 20;
    field("n_fft", self.n_fft(), {.at_least = 16, .at_most = kWidest, .bound = true},
          "STFT size and Hann window, samples");
    field("hop_length", self.hop_length(), {.at_least = 1, .bound = true}, "samples between frames, at most n_fft / 2");
    field("n_layers", self.n_layers(), {.required = true, .at_least = 1, .at_most = 1000, .bound = true},
          "encoder layers");
    field("emb_dim", self.emb_dim(), {.required = true, .at_least = 2, .at_most = kWidest, .bound = true},
          "width of a token, a multiple of 2 * n_heads");
    field("n_heads", self.n_heads(), {.required = true, .at_least = 1, .at_most = kWidest, .bound = true},
          "attention heads");
    field("ffn_hidden_dim", self.ffn_hidden_dim(), {.required = true, .at_least = 1, .at_most = kWidest, .bound = true},
          "widths of the feed-forward's hidden layers");
    field("reversible", self.reversible(), {.bound = true},
          "two streams, from which the backward pass computes all activations back: another model, for which "
          "gradient_checkpointing is false");
  }
};

/// Bytes of all the attention scores (float) that one forward pass would store for its backward pass if attention kept
/// them: per layer [batch·frames, heads, bins, bins] and [batch·bins, heads, frames, frames].
inline int64_t stored_scores_bytes(const TimeFrequencyTransformerOptions& options, int64_t batch, int64_t samples) {
  const int64_t bins = options.bins(), frames = options.frames(samples);
  return options.n_layers() * batch * options.n_heads() * bins * frames * (bins + frames) *
         static_cast<int64_t>(sizeof(float));
}

/// Separates a mixture into stems by complex masks on its spectrogram. Every time-frequency bin is a token; each layer
/// attends along frequency, then along time.
///
/// waveform [B,C,S] -> spectrum [B,C,F,T] -> tokens [B,T,F,dim] -> masks [B,N,C,F,T] -> stems [B,N,C,S].
///
/// A token is made of the real and imaginary parts of its bin in all channels, with the magnitude compressed to its
/// square root (loud and quiet bins come closer) and divided by the mixture's level, plus a learned vector of its
/// frequency. Masks start at 1/N each, the best guess that knows nothing.
class TimeFrequencyTransformerImpl : public torch::nn::Cloneable<TimeFrequencyTransformerImpl> {
 public:
  explicit TimeFrequencyTransformerImpl(const TimeFrequencyTransformerOptions& options) : options(options) { reset(); }

  void reset() override {
    require(options.n_layers() > 0 && options.emb_dim() > 0 && options.channels() > 0 && options.stems() > 0,
            "headroom.models.options", "n_layers ", options.n_layers(), ", emb_dim ", options.emb_dim(), ", channels ",
            options.channels(), ", stems ", options.stems(), "; expected positive numbers");
    const int64_t dim = options.emb_dim(), channels = options.channels();
    stft = register_module("stft", audio::Stft(audio::StftOptions().n_fft(options.n_fft()).hop(options.hop_length())));
    embed = register_module("embed", nn::Linear(2 * channels, dim));
    frequency_embedding = register_parameter("frequency_embedding", torch::randn({options.bins(), dim}) * 0.1);
    nn::EncoderOptions encoder_options(dim, options.n_heads(), options.ffn_hidden_dim(), options.n_layers());
    encoder_options.attention().request().backend(options.attention());
    encoder_options.gradient_checkpointing(options.gradient_checkpointing()).reversible(options.reversible());
    encoder = register_module(
        "encoder", nn::AxialEncoder(encoder_options, nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}}));
    final_norm = register_module("final_norm", nn::RMSNorm(dim));
    to_masks = register_module("to_masks", nn::Linear(dim, options.stems() * channels * 2));
    torch::NoGradGuard guard;
    to_masks->weight.mul_(0.1);
    to_masks->bias.view({-1, 2}).copy_(torch::tensor({1.0 / static_cast<double>(options.stems()), 0.0}));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::models::TimeFrequencyTransformer(n_fft=" << options.n_fft()
           << ", hop_length=" << options.hop_length() << ", n_layers=" << options.n_layers()
           << ", emb_dim=" << options.emb_dim() << ", n_heads=" << options.n_heads()
           << ", ffn_hidden_dim=" << at::IntArrayRef(options.ffn_hidden_dim()) << ", stems=" << options.stems() << ")";
  }

  /// mixture [B,C,S] -> stems [B,N,C,S]
  torch::Tensor forward(const torch::Tensor& mixture) {
    require(mixture.dim() == 3 && mixture.size(1) == options.channels(), "headroom.models.mixture", "mixture is ",
            mixture.sizes(), ", expected [B,", options.channels(), ",S]");
    const torch::Tensor spectrum = stft->forward(mixture);                     // [B,C,F,T]
    torch::Tensor x = embed->forward(tokens(spectrum)) + frequency_embedding;  // [B,T,F,dim]
    x = encoder->forward(x);
    const torch::Tensor masks =
        to_masks
            ->forward(final_norm->forward(x))  // [B,T,F,N·C·2]
            .to(spectrum.scalar_type() == torch::kComplexDouble ? torch::kDouble : torch::kFloat)
            .unflatten(-1, {options.stems(), options.channels(), 2});
    const torch::Tensor masked = torch::view_as_complex(masks).permute({0, 3, 4, 2, 1}) * spectrum.unsqueeze(1);
    return stft->inverse(masked, mixture.size(-1));  // [B,N,C,S]
  }

  TimeFrequencyTransformerOptions options;
  audio::Stft stft{nullptr};
  nn::Linear embed{nullptr}, to_masks{nullptr};
  torch::Tensor frequency_embedding;  // [F,dim]
  nn::AxialEncoder encoder{nullptr};
  nn::RMSNorm final_norm{nullptr};

 private:
  /// spectrum [B,C,F,T] -> [B,T,F,C·2]
  static torch::Tensor tokens(const torch::Tensor& spectrum) {
    const torch::Tensor magnitude = spectrum.abs();
    const torch::Tensor level = magnitude.mean({1, 2, 3}, /*keepdim=*/true).sqrt() + 1e-4;  // [B,1,1,1]
    const torch::Tensor compressed = spectrum * ((magnitude + 1e-8).rsqrt() / level);
    return torch::view_as_real(compressed).permute({0, 3, 2, 1, 4}).flatten(-2);
  }
};
TORCH_MODULE(TimeFrequencyTransformer);

}  // namespace headroom::inline v0::models
