#pragma once

#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "headroom/checkpoint/stack.hpp"
#include "headroom/core/error.hpp"
#include "headroom/nn/cross_transformer_layer.hpp"
#include "headroom/nn/sine_embedding.hpp"
#include "headroom/nn/token_norm.hpp"

namespace headroom::inline v0::nn {

/// Options of CrossTransformer.
struct CrossTransformerOptions {
  CrossTransformerOptions(int64_t dim, int64_t heads, int64_t layers) : layer_(dim, heads), layers_(layers) {}
  /// What each layer of either stream is.
  TORCH_ARG(CrossTransformerLayerOptions, layer);
  /// Layers of each stream.
  TORCH_ARG(int64_t, layers);
  /// The first layer has cross attention, the second self attention and so on; else the other way round.
  TORCH_ARG(bool, cross_first) = false;
  /// A norm of the features of each token before positions are added.
  TORCH_ARG(bool, norm_in) = true;
  /// Without norm_in, one over all tokens of an example together.
  TORCH_ARG(bool, norm_in_group) = false;
  /// Longest period of the positions' sines, in 2π tokens.
  TORCH_ARG(double, max_period) = 10000;
  /// Factor of the positions.
  TORCH_ARG(double, position_weight) = 1;
  /// What of the layers is kept for the backward pass; true: their inputs, the rest is computed again.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
};

/// The transformer of HTDemucs (Rouard et al. 2023, arXiv:2211.08553): two streams of tokens, of a spectrum and of a
/// waveform, through layers that by turns attend within a stream and to the other one. Parameters are norm_in,
/// norm_in_t, layers.I.* of the spectrum and layers_t.I.* of the waveform, see CrossTransformerLayer. No layer stores
/// scores.
class CrossTransformerImpl : public torch::nn::Module {
 public:
  /// Throws headroom.nn.cross_transformer.options, headroom.nn.attention.heads.
  explicit CrossTransformerImpl(const CrossTransformerOptions& options) : options(options) {
    using Attends = CrossTransformerLayerImpl::Attends;
    const int64_t dim = options.layer().dim();
    require(options.layers() >= 0 && dim > 0 && dim % 4 == 0, "headroom.nn.cross_transformer.options", options.layers(),
            " layers of width ", dim, "; expected a width that 4 divides, for the sines of two axes");
    if (options.norm_in() || options.norm_in_group()) {
      const NormOver over = options.norm_in() ? NormOver::token : NormOver::example;
      norm_in = register_module("norm_in", TokenNorm(dim, over));
      norm_in_t = register_module("norm_in_t", TokenNorm(dim, over));
    }
    layers = register_module("layers", torch::nn::ModuleList());
    layers_t = register_module("layers_t", torch::nn::ModuleList());
    for (int64_t i = 0; i < options.layers(); ++i) {
      const Attends attends = (i % 2 == 0) == options.cross_first() ? Attends::another : Attends::itself;
      const Pair pair{CrossTransformerLayer(options.layer(), attends), CrossTransformerLayer(options.layer(), attends)};
      layers->push_back(pair.spectrum);
      layers_t->push_back(pair.waveform);
      pairs_.push_back(pair);
    }
  }

  /// Of a spectrum [B,dim,F,T] and a waveform [B,dim,S], the same shapes. Throws headroom.nn.cross_transformer.shape,
  /// headroom.checkpoint.policy.
  std::pair<torch::Tensor, torch::Tensor> forward(const torch::Tensor& spectrum, const torch::Tensor& waveform) {
    const int64_t dim = options.layer().dim();
    require(spectrum.dim() == 4 && waveform.dim() == 3 && spectrum.size(1) == dim && waveform.size(1) == dim &&
                spectrum.size(0) == waveform.size(0),
            "headroom.nn.cross_transformer.shape", "the spectrum is ", spectrum.sizes(), " and the waveform ",
            waveform.sizes(), "; expected [B,", dim, ",F,T] and [B,", dim, ",S]");
    const int64_t bins = spectrum.size(2), frames = spectrum.size(3);
    torch::Tensor x = spectrum.permute({0, 3, 2, 1}).flatten(1, 2), xt = waveform.transpose(1, 2);  // [B,T·F,dim], …
    if (!norm_in.is_empty()) {
      x = norm_in->forward(x);
      xt = norm_in_t->forward(xt);
    }
    const auto grid = sine_embedding_2d(frames, bins, dim, options.max_period(), x.options()).flatten(0, 1);
    const auto line = sine_embedding(xt.size(1), dim, options.max_period(), xt.options());
    // Tokens of both streams stand in one tensor: layers are blocks of a stack like any other
    const auto both =
        run_stack(blocks(x.size(1), xt.size(1)),
                  torch::cat({x + options.position_weight() * grid, xt + options.position_weight() * line}, 1),
                  options.gradient_checkpointing())
            .split_with_sizes({x.size(1), xt.size(1)}, 1);
    return {both[0].unflatten(1, {frames, bins}).permute({0, 3, 2, 1}), both[1].transpose(1, 2)};
  }

  CrossTransformerOptions options;
  TokenNorm norm_in{nullptr}, norm_in_t{nullptr};
  torch::nn::ModuleList layers{nullptr}, layers_t{nullptr};

 private:
  /// A layer of each stream.
  struct Pair {
    CrossTransformerLayer spectrum, waveform;
  };

  /// For run_stack(), over tokens [B, of_spectrum + of_waveform, dim].
  std::vector<StackBlock> blocks(int64_t of_spectrum, int64_t of_waveform) const {
    std::vector<StackBlock> all;
    for (const Pair& pair : pairs_) {
      const auto forward = [of_x = pair.spectrum.ptr(), of_xt = pair.waveform.ptr(), of_spectrum,
                            of_waveform](const torch::Tensor& tokens) {
        const auto streams = tokens.split_with_sizes({of_spectrum, of_waveform}, 1);
        return torch::cat({of_x->forward(streams[0], streams[1]), of_xt->forward(streams[1], streams[0])}, 1);
      };
      std::vector<torch::Tensor> parameters = pair.spectrum->parameters();
      for (const torch::Tensor& x : pair.waveform->parameters()) parameters.push_back(x);
      all.push_back({{{forward, std::move(parameters), {0}}}});
    }
    return all;
  }

  std::vector<Pair> pairs_;
};
TORCH_MODULE(CrossTransformer);

}  // namespace headroom::inline v0::nn
