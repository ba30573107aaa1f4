#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/audio/stft.hpp"
#include "headroom/checkpoint/stack.hpp"
#include "headroom/models/roformer/band_split.hpp"
#include "headroom/models/roformer/mask_estimator.hpp"
#include "headroom/models/roformer/transformer.hpp"

// What BS-RoFormer and Mel-Band RoFormer have in common.
namespace headroom::inline v0::models {

/// Options of both models, named as in the published YAML files. Defaults are those of
/// Music-Source-Separation-Training.
struct RoformerOptions {
  /// Features of a token.
  TORCH_ARG(int64_t, dim) = 384;
  /// Layers: transformers along time and along the bands, in turn.
  TORCH_ARG(int64_t, depth) = 6;
  /// Blocks of each transformer.
  TORCH_ARG(int64_t, time_transformer_depth) = 2;
  TORCH_ARG(int64_t, freq_transformer_depth) = 2;
  /// Blocks of linear attention over all tokens at the start of each layer.
  TORCH_ARG(int64_t, linear_transformer_depth) = 0;
  /// Features of an attention head, even.
  TORCH_ARG(int64_t, dim_head) = 64;
  /// Attention heads; heads · dim_head need not be dim.
  TORCH_ARG(int64_t, heads) = 8;
  /// Probability that a weight or result of attention is dropped while training.
  TORCH_ARG(double, attn_dropout) = 0;
  /// The same of an activation or result of a feed-forward network.
  TORCH_ARG(double, ff_dropout) = 0;
  /// Size of the STFT, hop and Hann window, samples; the window is at most the size.
  TORCH_ARG(int64_t, stft_n_fft) = 2048;
  TORCH_ARG(int64_t, stft_hop_length) = 512;
  TORCH_ARG(int64_t, stft_win_length) = 2048;
  /// Layers of the mask estimators, see docs/110_models.md.
  TORCH_ARG(int64_t, mask_estimator_depth) = 2;
  /// Hidden width of the mask estimators, as a multiple of dim.
  TORCH_ARG(int64_t, mlp_expansion_factor) = 4;
  /// Each layer also gets the sum of what all layers before it gave.
  TORCH_ARG(bool, skip_connection) = false;
  /// 0: the classic layout. Else the layout of the PyPI package bs-roformer 1.2: residual streams, which
  /// hyper-connections mix, or with 1 plain sums; 4 is that package's default.
  TORCH_ARG(int64_t, num_residual_streams) = 0;
  /// Rounds of Sinkhorn's algorithm in the hyper-connections.
  TORCH_ARG(int64_t, mc_hyper_conn_sinkhorn_iters) = 2;
  /// From the second layer on, attention mixes the values of the first block along its axis into its own.
  TORCH_ARG(bool, add_value_residual) = false;
  /// Polar position embedding instead of rotary embedding.
  TORCH_ARG(bool, use_pope) = false;
  /// Attention along time reaches so many frames to both sides; 0: all of them.
  TORCH_ARG(int64_t, time_window) = 0;
  /// With a window: so many frames at the start see all frames and are seen by all.
  TORCH_ARG(int64_t, time_sinks) = 0;
  /// Channels of the mixture and of each stem.
  TORCH_ARG(int64_t, channels) = 2;
  TORCH_ARG(int64_t, stems) = 1;
  /// What of the blocks is kept for the backward pass; true: the input of each block, the rest is computed again. The
  /// mask estimators are computed again, a band at a time, where the last block is.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
  TORCH_ARG(AttentionBackend, attention) = AttentionBackend::automatic;

 public:
  /// Frequencies of a frame.
  int64_t bins() const { return stft_n_fft_ / 2 + 1; }
  /// Frames of so many samples.
  int64_t frames(int64_t samples) const { return 1 + samples / stft_hop_length_; }
  /// Transformer blocks, in the order in which they run.
  int64_t blocks() const {
    return depth_ * (linear_transformer_depth_ + time_transformer_depth_ + freq_transformer_depth_);
  }

 protected:
  /// The options that say which model it is, as a configuration names them.
  static void describe_shared(auto& self, auto&& field) {
    constexpr double kWidest = 1 << 20;
    field("dim", self.dim(), {.required = true, .at_least = 1, .at_most = kWidest, .bound = true}, "width of a token");
    field("depth", self.depth(), {.required = true, .at_least = 1, .at_most = 1000, .bound = true},
          "layers: transformers along time and along the bands, in turn");
    field("time_transformer_depth", self.time_transformer_depth(), {.at_least = 1, .at_most = 1000, .bound = true},
          "blocks of a transformer along time");
    field("freq_transformer_depth", self.freq_transformer_depth(), {.at_least = 1, .at_most = 1000, .bound = true},
          "blocks of a transformer along the bands");
    field("linear_transformer_depth", self.linear_transformer_depth(), {.at_least = 0, .at_most = 1000, .bound = true},
          "blocks of linear attention over all tokens, at the start of each layer");
    field("dim_head", self.dim_head(), {.at_least = 2, .at_most = kWidest, .bound = true},
          "width of an attention head, even");
    field("heads", self.heads(), {.at_least = 1, .at_most = kWidest, .bound = true}, "attention heads");
    field("attn_dropout", self.attn_dropout(), {.at_least = 0, .below = 1}, "of attention, while training");
    field("ff_dropout", self.ff_dropout(), {.at_least = 0, .below = 1}, "of the feed-forward networks, while training");
    field("stft_n_fft", self.stft_n_fft(), {.at_least = 16, .at_most = kWidest, .bound = true}, "STFT size, samples");
    field("stft_hop_length", self.stft_hop_length(), {.at_least = 1, .bound = true}, "samples between frames");
    field("stft_win_length", self.stft_win_length(), {.at_least = 16, .at_most = kWidest, .bound = true},
          "Hann window, samples, at most stft_n_fft");
    field("mask_estimator_depth", self.mask_estimator_depth(), {.at_least = 1, .at_most = 100, .bound = true},
          "layers of the mask estimators, see docs/110_models.md");
    field("mlp_expansion_factor", self.mlp_expansion_factor(), {.at_least = 1, .at_most = 1000, .bound = true},
          "hidden width of the mask estimators, as a multiple of dim");
    field("skip_connection", self.skip_connection(), {.bound = true},
          "each layer also gets the sum of what all layers before it gave");
    field("num_residual_streams", self.num_residual_streams(), {.at_least = 0, .at_most = 64, .bound = true},
          "residual streams; 0 is the classic layout, 1 the newer one with plain sums, see docs/110_models.md");
    field("mc_hyper_conn_sinkhorn_iters", self.mc_hyper_conn_sinkhorn_iters(),
          {.at_least = 1, .at_most = 100, .bound = true}, "rounds of Sinkhorn's algorithm, with residual streams");
    field("add_value_residual", self.add_value_residual(), {.bound = true},
          "attention mixes the values of the first block along its axis into its own");
    field("use_pope", self.use_pope(), {.bound = true}, "polar position embedding instead of rotary embedding");
    field("time_window", self.time_window(), {.at_least = 0, .bound = true},
          "frames to both sides that attention along time reaches; 0: all");
    field("time_sinks", self.time_sinks(), {.at_least = 0, .bound = true},
          "with a window: frames at the start that see all frames and are seen by all");
  }
};

namespace detail {

/// What tells one RoFormer from another, beside the options.
struct RoformerLayout {
  std::vector<Band> bands;
  bool norm_each_transformer;  ///< else one norm after all layers: final_norm
  bool of_mel;                 ///< value residuals are those of Mel-Band RoFormers
  int64_t mask_hidden_layers;
  bool silent_dc;                 ///< the stems have nothing in bin 0
  bool match_input_audio_length;  ///< else what follows the last whole hop is silent
};

/// The policy of the blocks [begin, begin + count) of a stack.
inline StackPolicy policy_of(const StackPolicy& policy, int64_t begin, int64_t count) {
  StackPolicy result(policy.rest);
  for (const auto& [blocks, part] : policy.first) {
    const int64_t passed = std::min(blocks, begin), taken = std::min(blocks - passed, count);
    if (taken > 0) result.first.push_back({taken, part});
    begin -= passed;
    count -= taken;
  }
  return result;
}

}  // namespace detail

/// Separates a mixture into stems by complex masks on its spectrum. A token is what a band of frequency bins holds in a
/// frame; each layer attends along time, then along the bands.
///
/// mixture [B,C,S] -> spectrum [B,C,F,T] -> tokens [B,T,K,dim] -> masks [B,N,T,F,C] -> stems [B,N,C,S].
///
/// Kept for backward by a block without dropout: its input x, q, k and v, what attention gives with its log-sum-exp,
/// the gates, x after attention, and the input of GELU. By the mask estimators: what they are given, the result of each
/// tanh and the input of the gated linear unit.
class RoformerImpl : public torch::nn::Module {
 public:
  /// mixture [B,C,S] -> stems [B,N,C,S]. Throws headroom.models.mixture.
  torch::Tensor forward(const torch::Tensor& mixture) {
    const auto& o = shared_;
    require(mixture.dim() == 3 && mixture.size(1) == o.channels(), "headroom.models.mixture", "mixture is ",
            mixture.sizes(), ", expected [B,", o.channels(), ",S]");
    const torch::Tensor spectrum = stft->forward(mixture);        // [B,C,F,T]
    torch::Tensor x = run_layers(band_split->forward(spectrum));  // [B,T,K,dim]
    if (!final_norm.is_empty()) x = final_norm->forward(x);
    const torch::Tensor masked = masks(std::move(x)).permute({0, 1, 4, 3, 2}) * spectrum.unsqueeze(1);  // [B,N,C,F,T]
    const int64_t samples = mixture.size(-1), whole = samples / o.stft_hop_length() * o.stft_hop_length();
    if (layout_.match_input_audio_length || whole == samples) return stft->inverse(masked, samples);
    return torch::constant_pad_nd(stft->inverse(masked, whole), {0, samples - whole});
  }

  audio::Stft stft{nullptr};
  torch::nn::ModuleList layers{nullptr}, mask_estimators{nullptr};
  BandSplit band_split{nullptr};
  nn::RMSNorm final_norm{nullptr};  // empty where each transformer has a norm

 protected:
  RoformerImpl(const RoformerOptions& options, detail::RoformerLayout layout)
      : shared_(options), layout_(std::move(layout)) {
    const auto& o = shared_;
    require(o.dim() > 0 && o.depth() > 0 && o.heads() > 0 && o.channels() > 0 && o.stems() > 0,
            "headroom.models.options", "dim ", o.dim(), ", depth ", o.depth(), ", heads ", o.heads(), ", channels ",
            o.channels(), ", stems ", o.stems(), "; expected positive numbers");
    require(o.num_residual_streams() >= 0 && o.mc_hyper_conn_sinkhorn_iters() > 0, "headroom.models.options",
            "num_residual_streams is ", o.num_residual_streams(), " and mc_hyper_conn_sinkhorn_iters ",
            o.mc_hyper_conn_sinkhorn_iters(), "; expected 0 or more, and 1 or more");
    require(o.time_window() >= 0 && o.time_sinks() >= 0 && (o.time_window() > 0 || o.time_sinks() == 0),
            "headroom.models.options", "time_window is ", o.time_window(), " and time_sinks ", o.time_sinks(),
            "; expected numbers of frames, and sinks with a window alone");
    stft = register_module(
        "stft",
        audio::Stft(audio::StftOptions().n_fft(o.stft_n_fft()).hop(o.stft_hop_length()).window(o.stft_win_length())));
    band_split = register_module("band_split", BandSplit(layout_.bands, o.channels(), o.dim()));
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < o.depth(); ++i) {
      torch::nn::ModuleList layer;
      for (const RoformerTransformer& transformer : add_layer()) layer->push_back(transformer);
      layers->push_back(layer);
    }
    if (!layout_.norm_each_transformer) final_norm = register_module("final_norm", detail::gamma_norm(o.dim()));
    mask_estimators = register_module("mask_estimators", torch::nn::ModuleList());
    for (int64_t i = 0; i < o.stems(); ++i) {
      estimators_.emplace_back(MaskEstimatorOptions()
                                   .dim(o.dim())
                                   .hidden(o.dim() * o.mlp_expansion_factor())
                                   .hidden_layers(layout_.mask_hidden_layers)
                                   .channels(o.channels())
                                   .bands(layout_.bands));
      mask_estimators->push_back(estimators_.back());
    }
  }

 private:
  /// The transformers of a layer, in their order: over all tokens, along time, along the bands.
  struct Layer {
    RoformerTransformer linear{nullptr}, time{nullptr}, bands{nullptr};
  };

  std::vector<RoformerTransformer> add_layer() {
    const auto& o = shared_;
    const auto transformer = [&](int64_t depth, const PositionEmbedding& positions, bool along_time = false) {
      return RoformerTransformer(RoformerTransformerOptions()
                                     .attention(attention_options(along_time))
                                     .depth(depth)
                                     .ff_dropout(o.ff_dropout())
                                     .norm_output(layout_.norm_each_transformer)
                                     .streams(o.num_residual_streams())
                                     .sinkhorn_iters(o.mc_hyper_conn_sinkhorn_iters()),
                                 positions);
    };
    Layer layer;
    std::vector<RoformerTransformer> all;
    if (o.linear_transformer_depth() > 0) {
      all.push_back(layer.linear = transformer(o.linear_transformer_depth(), {}));
    }
    all.push_back(layer.time = transformer(o.time_transformer_depth(), time_positions_, /*along_time=*/true));
    all.push_back(layer.bands = transformer(o.freq_transformer_depth(), band_positions_));
    layers_.push_back(layer);
    return all;
  }
  /// Of the layer that is added.
  GatedAttentionOptions attention_options(bool along_time) const {
    const auto& o = shared_;
    GatedAttentionOptions attention;
    attention.dim(o.dim()).heads(o.heads()).head_dim(o.dim_head()).dropout(o.attn_dropout()).backend(o.attention());
    attention.of_mel(layout_.of_mel);
    if (o.add_value_residual()) {
      attention.value_residual(layers_.empty()  ? ValueResidual::gives
                               : layout_.of_mel ? ValueResidual::transposes
                                                : ValueResidual::mixes);
    }
    if (along_time && o.time_window() > 0) attention.window(o.time_window()).global_tokens(o.time_sinks());
    return attention;
  }
  static PositionEmbedding position_embedding(const RoformerOptions& o) {
    if (o.use_pope()) return PolarEmbedding(o.heads(), o.dim_head());
    return RotaryEmbedding(o.dim_head());
  }

  /// Where attention takes place in one forward pass over tokens x [B,T,K,dim].
  struct AxisPlaces {
    AttentionPlace linear{1, {}}, time{1, {}}, bands{2, {}};

    AxisPlaces(const RoformerImpl& model, const torch::Tensor& x) {
      time.positions = model.time_positions_.table(x.size(1));
      bands.positions = model.band_positions_.table(x.size(2));
      if (!model.shared_.add_value_residual()) return;
      for (AttentionPlace* place : {&linear, &time, &bands}) place->first_values = std::make_shared<FirstValues>();
    }
    ~AxisPlaces() {
      for (const AttentionPlace* place : {&linear, &time, &bands}) {
        if (place->first_values != nullptr) place->first_values->leave_graph();
      }
    }
    AxisPlaces(const AxisPlaces&) = delete;
    AxisPlaces& operator=(const AxisPlaces&) = delete;
  };

  /// tokens [B,T,K,dim] -> same shape
  torch::Tensor run_layers(torch::Tensor x) {
    const StackPolicy& policy = shared_.gradient_checkpointing();
    require(policy.named_blocks() <= shared_.blocks(), "headroom.checkpoint.policy", "the checkpoint policy is \"",
            policy.text(), "\", which names ", policy.named_blocks(), " blocks; this model has ", shared_.blocks());
    const int64_t streams = std::max<int64_t>(shared_.num_residual_streams(), 1);
    if (streams > 1) x = x.unsqueeze(1).expand({-1, streams, -1, -1, -1}).flatten(0, 1);
    const AxisPlaces places(*this, x);
    std::vector<StackBlock> blocks;
    const auto append = [&](const RoformerTransformer& transformer, const AttentionPlace& place) {
      for (StackBlock& block : transformer->blocks(place, x.sizes())) blocks.push_back(std::move(block));
    };
    torch::Tensor sum;  // of what the layers gave so far
    int64_t done = 0;
    const auto run = [&] {
      const auto count = static_cast<int64_t>(blocks.size());
      x = run_stack(blocks, std::move(x), detail::policy_of(policy, done, count));
      done += count;
      blocks.clear();
    };
    for (const Layer& layer : layers_) {
      if (!layer.linear.is_empty()) append(layer.linear, places.linear);
      if (shared_.skip_connection() && sum.defined()) {
        if (!blocks.empty()) run();
        x = x + sum;
      }
      append(layer.time, places.time);
      append(layer.bands, places.bands);
      if (!shared_.skip_connection()) continue;
      run();
      sum = sum.defined() ? sum + x : x;
    }
    if (!blocks.empty()) run();
    return streams == 1 ? x : x.unflatten(0, {-1, streams}).sum(1);
  }

  /// tokens [B,T,K,dim] -> complex masks [B,N,T,F,C]
  torch::Tensor masks(torch::Tensor tokens) {
    const std::vector<torch::Tensor> by_band =
        std::exchange(tokens, {}).movedim(2, 0).contiguous().unbind(0);   // K of [B,T,dim]
    std::vector<std::vector<torch::Tensor>> by_stem(estimators_.size());  // N times K of [B,T,count·C·2]
    for (size_t k = 0; k < by_band.size(); ++k) {
      // A band at a time: only its part of the estimators is there when it is computed again
      const auto estimate = [estimators = estimators_, k](const torch::Tensor& x) {
        std::vector<torch::Tensor> all;
        for (MaskEstimator estimator : estimators) all.push_back(estimator->forward(x, static_cast<int64_t>(k)));
        return all;
      };
      const auto all = run_under(shared_.gradient_checkpointing().rest, estimate, by_band[k]);
      for (size_t n = 0; n < all.size(); ++n) by_stem[n].push_back(all[n].to(audio::detail::compute_type(all[n])));
    }
    const detail::MeanOfBands::Layout layout{layout_.bands, shared_.bins(), 2 * shared_.channels(), layout_.silent_dc};
    std::vector<torch::Tensor> means;
    for (std::vector<torch::Tensor>& stem : by_stem) {
      means.push_back(detail::MeanOfBands::apply(at::TensorList(stem), layout));  // [B,T,F·C·2]
      stem.clear();
    }
    return torch::view_as_complex(torch::stack(means, 1).unflatten(-1, {shared_.bins(), shared_.channels(), 2}));
  }

  RoformerOptions shared_;
  detail::RoformerLayout layout_;
  PositionEmbedding time_positions_ = position_embedding(shared_),
                    band_positions_ = position_embedding(shared_);  // each shared by all layers
  std::vector<Layer> layers_;
  std::vector<MaskEstimator> estimators_;
};

}  // namespace headroom::inline v0::models
