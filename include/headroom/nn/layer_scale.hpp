#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>
#include <vector>

namespace headroom::inline v0::nn {

/// x + scale · y with a learned factor for each feature, small at first, so that a residual branch y begins close to
/// nothing (Touvron et al. 2021, arXiv:2103.17239).
class LayerScaleImpl : public torch::nn::Cloneable<LayerScaleImpl> {
 public:
  LayerScaleImpl(int64_t features, double start) : features_(features), start_(start) { reset(); }

  void reset() override { scale = register_parameter("scale", torch::full({features_}, start_)); }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::LayerScale(" << features_ << ", start=" << start_ << ")";
  }

  /// x and y of one shape with the features along dimension `axis` -> the same shape.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& y, int64_t axis = -1) {
    const int64_t behind = axis < 0 ? -1 - axis : x.dim() - 1 - axis;
    std::vector<int64_t> sizes(static_cast<size_t>(behind) + 1, 1);
    sizes.front() = features_;
    return x + scale.view(sizes) * y;
  }

  torch::Tensor scale;  // [features]

 private:
  int64_t features_;
  double start_;
};
TORCH_MODULE(LayerScale);

}  // namespace headroom::inline v0::nn
