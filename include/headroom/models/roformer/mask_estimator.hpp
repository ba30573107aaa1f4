#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "headroom/models/roformer/bands.hpp"
#include "headroom/models/roformer/parts.hpp"

namespace headroom::inline v0::models {

/// Options of MaskEstimator.
struct MaskEstimatorOptions {
  /// Features of a token.
  TORCH_ARG(int64_t, dim) = 0;
  /// Width of the hidden layers.
  TORCH_ARG(int64_t, hidden) = 0;
  /// Hidden layers, none or more.
  TORCH_ARG(int64_t, hidden_layers) = 1;
  /// Channels of the stem.
  TORCH_ARG(int64_t, channels) = 2;
  /// The bins of each token of a frame.
  TORCH_ARG(std::vector<Band>, bands) = {};
};

/// What one stem's masks are in each band: linear layers with tanh between them, and a gated linear unit, by parameters
/// of each band's own, to_freqs.K.0.{0,2,…}.{weight,bias}.
class MaskEstimatorImpl : public torch::nn::Module {
 public:
  explicit MaskEstimatorImpl(const MaskEstimatorOptions& options) {
    to_freqs = register_module("to_freqs", torch::nn::ModuleList());
    for (const Band& band : options.bands()) {
      torch::nn::ModuleList layers;
      std::vector<nn::Linear>& linears = linears_.emplace_back();
      const auto append = [&](int64_t in, int64_t out) {
        linears.emplace_back(in, out);
        layers->push_back(linears.back());
      };
      int64_t width = options.dim();
      for (int64_t i = 0; i < options.hidden_layers(); ++i) {
        append(width, options.hidden());
        layers->push_back(torch::nn::Tanh());
        width = options.hidden();
      }
      append(width, 4 * band.count * options.channels());  // twice the band's width: values and gates
      to_freqs->push_back(torch::nn::ModuleList(layers, torch::nn::GLU()));
    }
  }

  /// The tokens of a band, [B,T,dim] -> its masks [B,T,count·channels·2], real and imaginary parts in turn. Saves the
  /// tokens, the result of each tanh and the input of the gated linear unit.
  torch::Tensor forward(const torch::Tensor& tokens, int64_t band) {
    torch::Tensor x = tokens;
    for (size_t i = 0; i < linears_[band].size(); ++i) {
      if (i > 0) x = x.tanh();
      x = linears_[band][i]->forward(x);
    }
    return torch::glu(x, -1);
  }

  torch::nn::ModuleList to_freqs{nullptr};

 private:
  std::vector<std::vector<nn::Linear>> linears_;
};
TORCH_MODULE(MaskEstimator);

namespace detail {

/// The mean of the bands' masks in each bin: masks [B,T,count·width] of each band -> [B,T,bins·width]. Nothing is
/// saved. `silent_dc`: the mask of bin 0 is 0.
struct MeanOfBands : torch::autograd::Function<MeanOfBands> {
  struct Layout {
    std::vector<Band> bands;
    int64_t bins, width;
    bool silent_dc;

    torch::Tensor part(const torch::Tensor& all, const Band& band) const {
      return all.narrow(-1, band.first * width, band.count * width);
    }
    /// Divides each bin by the number of its bands.
    void divide(const torch::Tensor& all) const {
      if (silent_dc) part(all, {0, 1}).zero_();
      const std::vector<int64_t> counts = bands_per_bin(bands, bins);
      for (int64_t first = 0, next = 0; first < bins; first = next) {
        while (next < bins && counts[next] == counts[first]) ++next;
        if (counts[first] > 1) part(all, {first, next - first}).div_(counts[first]);
      }
    }
  };

  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList masks, const Layout& layout) {
    std::vector<int64_t> places, sizes = masks[0].sizes().vec();
    for (const auto& [first, count] : layout.bands) places.insert(places.end(), {first, count});
    ctx->saved_data["places"] = places;
    ctx->saved_data["shape"] = std::tuple(layout.bins, layout.width, layout.silent_dc);
    sizes.back() = layout.bins * layout.width;
    const torch::Tensor mean = torch::zeros(sizes, masks[0].options());
    for (size_t k = 0; k < layout.bands.size(); ++k) layout.part(mean, layout.bands[k]).add_(masks[k]);
    layout.divide(mean);
    return mean;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const std::vector<int64_t> places = ctx->saved_data["places"].toIntVector();
    const auto shape = ctx->saved_data["shape"].toTuple();
    Layout layout{{}, shape->elements()[0].toInt(), shape->elements()[1].toInt(), shape->elements()[2].toBool()};
    for (size_t i = 0; i < places.size(); i += 2) layout.bands.push_back({places[i], places[i + 1]});
    const torch::Tensor grad = grads[0].clone(at::MemoryFormat::Contiguous);
    layout.divide(grad);
    torch::autograd::variable_list result;
    for (const Band& band : layout.bands) result.push_back(layout.part(grad, band));
    result.emplace_back();  // layout
    return result;
  }
};

}  // namespace detail
}  // namespace headroom::inline v0::models
