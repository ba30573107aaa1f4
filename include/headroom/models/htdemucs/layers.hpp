#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "headroom/models/htdemucs/convolution.hpp"
#include "headroom/models/htdemucs/options.hpp"
#include "headroom/nn/layer_scale.hpp"

// The layers of both branches. A spectrum [B,C,F,T] is convolved along its frequencies, a waveform [B,C,S] along time:
// along dimension 2.
namespace headroom::inline v0::models {

/// A layer's place in the model: its depth, its branch, and the channels in front of and behind the encoder's layer.
/// The decoder's layer takes back what the encoder's made.
struct HTDemucsPlace {
  int64_t index = 0;
  bool spectrum = false;
  int64_t outer = 0, inner = 0;
};

namespace detail {

/// A kernel and the like along dimension 2, and for a spectrum 1 or 0 along time.
inline std::vector<int64_t> along_axis(const HTDemucsPlace& place, int64_t size, int64_t along_time) {
  return place.spectrum ? std::vector<int64_t>{size, along_time} : std::vector<int64_t>{size};
}

/// The convolution in front of a gated linear unit: along both axes of a spectrum.
inline Convolution rewrite_convolution(const HTDemucsPlace& place, int64_t context) {
  return Convolution(
      ConvolutionOptions(place.inner, 2 * place.inner, along_axis(place, 1 + 2 * context, 1 + 2 * context))
          .padding(along_axis(place, context, context)));
}

/// The group norm of a layer, empty where norms do not start yet.
inline torch::nn::GroupNorm layer_norm_of(const HTDemucsOptions& options, const HTDemucsPlace& place,
                                          int64_t channels) {
  if (place.index < options.norm_starts()) return nullptr;
  return torch::nn::GroupNorm(options.norm_groups(), channels);
}
inline torch::Tensor normed(torch::nn::GroupNorm& norm, const torch::Tensor& x) {
  return norm.is_empty() ? x : norm->forward(x);
}

}  // namespace detail

/// Residual branches of dilated convolutions along time, each narrower than what it is added to. Parameters are
/// layers.I.{0,3} (convolutions), layers.I.{1,4} (norms) and layers.I.6.scale.
class DilatedBranchesImpl : public torch::nn::Module {
 public:
  DilatedBranchesImpl(const HTDemucsOptions& options, int64_t channels) {
    layers = register_module("layers", torch::nn::ModuleList());
    const int64_t hidden = channels / options.dconv_comp();
    for (int64_t i = 0; i < options.dconv_depth(); ++i) {
      const int64_t dilation = int64_t{1} << i;
      const Layer layer{Convolution(ConvolutionOptions(channels, hidden, {3}).padding({dilation}).dilation(dilation)),
                        Convolution(ConvolutionOptions(hidden, 2 * channels, {1})), torch::nn::GroupNorm(1, hidden),
                        torch::nn::GroupNorm(1, 2 * channels), nn::LayerScale(channels, options.dconv_init())};
      layers->push_back(torch::nn::ModuleList(layer.narrow, layer.narrow_norm, torch::nn::GELU(), layer.widen,
                                              layer.widen_norm, torch::nn::GLU(1), layer.scale));
      layers_.push_back(layer);
    }
  }

  /// x [B,C,T] or, each frequency by itself, [B,C,F,T] -> same shape
  torch::Tensor forward(const torch::Tensor& x) {
    if (x.dim() == 3) return along_time(x);
    const torch::Tensor rows = x.transpose(1, 2);  // [B,F,C,T]
    return along_time(rows.flatten(0, 1)).view(rows.sizes()).transpose(1, 2);
  }

  torch::nn::ModuleList layers{nullptr};

 private:
  struct Layer {
    Convolution narrow, widen;
    torch::nn::GroupNorm narrow_norm, widen_norm;
    nn::LayerScale scale;
  };

  torch::Tensor along_time(torch::Tensor x) {
    for (Layer& layer : layers_) {
      const torch::Tensor hidden = torch::gelu(layer.narrow_norm->forward(layer.narrow->forward(x)));
      x = layer.scale->forward(x, torch::glu(layer.widen_norm->forward(layer.widen->forward(hidden)), 1), 1);
    }
    return x;
  }

  std::vector<Layer> layers_;
};
TORCH_MODULE(DilatedBranches);

/// Fewer steps of more channels. Parameters are conv, norm1, rewrite, norm2 and dconv, where the options have them.
class HTDemucsEncoderLayerImpl : public torch::nn::Module {
 public:
  HTDemucsEncoderLayerImpl(const HTDemucsOptions& options, const HTDemucsPlace& place)
      : stride_(options.stride()),
        conv_(register_module("conv",
                              Convolution(ConvolutionOptions(place.outer, place.inner,
                                                             detail::along_axis(place, options.kernel_size(), 1))
                                              .stride(detail::along_axis(place, options.stride(), 1))
                                              .padding(detail::along_axis(place, options.kernel_size() / 4, 0))))),
        norm1_(detail::layer_norm_of(options, place, place.inner)),
        norm2_(nullptr) {
    if (!norm1_.is_empty()) register_module("norm1", norm1_);
    if (options.rewrite()) {
      rewrite_ = register_module("rewrite", detail::rewrite_convolution(place, options.context_enc()));
      norm2_ = detail::layer_norm_of(options, place, 2 * place.inner);
      if (!norm2_.is_empty()) register_module("norm2", norm2_);
    }
    if ((options.dconv_mode() & 1) != 0) dconv_ = register_module("dconv", DilatedBranches(options, place.inner));
  }

  /// x [B,outer,L] or [B,outer,L,T] -> [B,inner,L/stride] or [B,inner,L/stride,T], an incomplete stride filled up with
  /// 0.
  torch::Tensor forward(const torch::Tensor& x) {
    const int64_t rest = x.size(2) % stride_;  // of waveforms alone
    torch::Tensor y = conv_->forward(rest == 0 ? x : torch::constant_pad_nd(x, {0, stride_ - rest}));
    y = torch::gelu(detail::normed(norm1_, y));
    if (!dconv_.is_empty()) y = dconv_->forward(y);
    return rewrite_.is_empty() ? y : torch::glu(detail::normed(norm2_, rewrite_->forward(y)), 1);
  }

 private:
  int64_t stride_;
  Convolution conv_{nullptr}, rewrite_{nullptr};
  torch::nn::GroupNorm norm1_, norm2_;
  DilatedBranches dconv_{nullptr};
};
TORCH_MODULE(HTDemucsEncoderLayer);

/// More steps of fewer channels. Parameters are rewrite, norm1, dconv, conv_tr and norm2, where the options have them.
class HTDemucsDecoderLayerImpl : public torch::nn::Module {
 public:
  HTDemucsDecoderLayerImpl(const HTDemucsOptions& options, const HTDemucsPlace& place)
      : is_last_(place.index == 0),
        cut_(options.kernel_size() / 4),
        conv_tr_(register_module("conv_tr",
                                 Convolution(ConvolutionOptions(place.inner, place.outer,
                                                                detail::along_axis(place, options.kernel_size(), 1))
                                                 .stride(detail::along_axis(place, options.stride(), 1))
                                                 .transposed(true)))),
        norm1_(nullptr),
        norm2_(detail::layer_norm_of(options, place, place.outer)) {
    if (!norm2_.is_empty()) register_module("norm2", norm2_);
    if (options.rewrite()) {
      rewrite_ = register_module("rewrite", detail::rewrite_convolution(place, options.context()));
      norm1_ = detail::layer_norm_of(options, place, 2 * place.inner);
      if (!norm1_.is_empty()) register_module("norm1", norm1_);
    }
    if ((options.dconv_mode() & 2) != 0) dconv_ = register_module("dconv", DilatedBranches(options, place.inner));
  }

  /// x and what the encoder's layer of the same place gave, to `length` steps.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& skip, int64_t length) {
    torch::Tensor y = x + skip;
    if (!rewrite_.is_empty()) y = torch::glu(detail::normed(norm1_, rewrite_->forward(y)), 1);
    if (!dconv_.is_empty()) y = dconv_->forward(y);
    y = detail::normed(norm2_, conv_tr_->forward(y)).narrow(2, cut_, length);
    return is_last_ ? y : torch::gelu(y);
  }

 private:
  bool is_last_;
  int64_t cut_;
  Convolution conv_tr_{nullptr}, rewrite_{nullptr};
  torch::nn::GroupNorm norm1_, norm2_;
  DilatedBranches dconv_{nullptr};
};
TORCH_MODULE(HTDemucsDecoderLayer);

}  // namespace headroom::inline v0::models
