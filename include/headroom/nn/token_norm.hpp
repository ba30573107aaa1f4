#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <ostream>

namespace headroom::inline v0::nn {

/// What a TokenNorm brings to mean 0 and deviation 1.
enum class NormOver {
  token,   ///< the features of each token: a layer norm
  example  ///< all features of all tokens of an example together: a group norm with one group
};

/// A norm of tokens [B,L,dim] with a weight and a bias for each feature, as torch::nn::LayerNorm and
/// torch::nn::GroupNorm have them.
class TokenNormImpl : public torch::nn::Cloneable<TokenNormImpl> {
 public:
  TokenNormImpl(int64_t dim, NormOver over) : dim_(dim), over_(over) { reset(); }

  void reset() override {
    weight = register_parameter("weight", torch::ones({dim_}));
    bias = register_parameter("bias", torch::zeros({dim_}));
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::TokenNorm(" << dim_ << ", over=" << (over_ == NormOver::token ? "token" : "example")
           << ")";
  }

  /// x [B,L,dim] -> same shape
  torch::Tensor forward(const torch::Tensor& x) {
    constexpr double kEps = 1e-5;
    if (over_ == NormOver::token) return torch::layer_norm(x, {dim_}, weight, bias, kEps);
    return torch::group_norm(x.transpose(1, 2), 1, weight, bias, kEps).transpose(1, 2);
  }

  torch::Tensor weight, bias;  // [dim]

 private:
  int64_t dim_;
  NormOver over_;
};
TORCH_MODULE(TokenNorm);

}  // namespace headroom::inline v0::nn
