#pragma once

#include <torch/nn/modules/container/modulelist.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "headroom/models/roformer/bands.hpp"
#include "headroom/models/roformer/parts.hpp"

namespace headroom::inline v0::models {

/// A token for each band and frame of a spectrum: norm and projection of the band's bins, by parameters of its own.
/// Parameters are to_features.K.0.gamma, to_features.K.1.{weight,bias}.
class BandSplitImpl : public torch::nn::Module {
 public:
  BandSplitImpl(std::vector<Band> bands, int64_t channels, int64_t dim) : bands_(std::move(bands)) {
    to_features = register_module("to_features", torch::nn::ModuleList());
    for (const Band& band : bands_) {
      const int64_t width = 2 * band.count * channels;
      norms_.push_back(detail::gamma_norm(width));
      linears_.emplace_back(width, dim);
      to_features->push_back(torch::nn::ModuleList(norms_.back(), linears_.back()));
    }
  }

  /// spectrum [B,C,F,T], complex -> tokens [B,T,K,dim]; saves a copy of each band's bins.
  torch::Tensor forward(const torch::Tensor& spectrum) {
    const torch::Tensor bins = torch::view_as_real(spectrum).permute({0, 3, 2, 1, 4});  // [B,T,F,C,2]
    std::vector<torch::Tensor> tokens;
    for (size_t k = 0; k < bands_.size(); ++k) {
      auto chain = detail::normed(bins.narrow(2, bands_[k].first, bands_[k].count).flatten(2), norms_[k]);
      detail::append(chain, linears_[k]);
      tokens.push_back(nn::detail::run(std::move(chain)));  // [B,T,dim]
    }
    return torch::stack(tokens, 2);
  }

  torch::nn::ModuleList to_features{nullptr};

 private:
  std::vector<Band> bands_;
  std::vector<nn::RMSNorm> norms_;
  std::vector<nn::Linear> linears_;
};
TORCH_MODULE(BandSplit);

}  // namespace headroom::inline v0::models
