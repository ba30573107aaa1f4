#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/checkpoint/function.hpp"
#include "headroom/models/roformer/parts.hpp"
#include "headroom/nn/stream_mix.hpp"

namespace headroom::inline v0::models {

/// Options of HyperConnection.
struct HyperConnectionOptions {
  /// Features of a token.
  TORCH_ARG(int64_t, dim) = 0;
  /// Residual streams; 1: the branch alone.
  TORCH_ARG(int64_t, streams) = 4;
  /// Rounds of Sinkhorn's algorithm.
  TORCH_ARG(int64_t, sinkhorn_iters) = 2;
  /// The stream that the branch reads at first.
  TORCH_ARG(int64_t, first_stream) = 0;
};

/// A branch (attention or feed-forward network) in the place of x + branch(x), where S residual streams x_s take the
/// place of x (manifold-constrained hyper-connections; Xie et al. 2025, arXiv:2512.24880):
///   out_t = sum over s of mixing_st·x_s + writing_t·branch(sum over s of reading_s·x_s)
/// All three depend on the position. The projections of the streams' norms, and with them what is learned for all
/// positions, go through a sigmoid (reading, and twice it for writing) or, for mixing, exp and Sinkhorn's algorithm,
/// which makes rows and columns sum up to 1.
/// Parameters are named as in the PyPI package hyper-connections 0.4: norm.gamma (to which 1 is added), static_alpha
/// [S,1+S], dynamic_alpha_fn [1,dim,1+S], pre_branch_scale [1], residual_scale [1], static_beta [S], dynamic_beta_fn
/// [dim], h_post_scale [], and branch.…; with one stream branch.… alone.
class HyperConnectionImpl : public torch::nn::Module {
 public:
  HyperConnectionImpl(const HyperConnectionOptions& options, std::shared_ptr<torch::nn::Module> branch)
      : options(options), norm_(nullptr) {
    register_module("branch", std::move(branch));
    const int64_t streams = options.streams(), dim = options.dim();
    if (streams == 1) return;
    const torch::Tensor first = torch::eye(streams).narrow(1, options.first_stream(), 1);
    norm_ = detail::gamma_norm(dim);
    torch::NoGradGuard guard;
    norm_->weight.zero_();
    register_module("norm", norm_);
    static_alpha = register_parameter("static_alpha", torch::cat({first, torch::eye(streams)}, 1));
    dynamic_alpha_fn = register_parameter("dynamic_alpha_fn", torch::zeros({1, dim, 1 + streams}));
    pre_branch_scale = register_parameter("pre_branch_scale", torch::full({1}, 0.01));
    residual_scale = register_parameter("residual_scale", torch::full({1}, 0.01));
    static_beta = register_parameter("static_beta", torch::ones({streams}));
    dynamic_beta_fn = register_parameter("dynamic_beta_fn", torch::zeros({dim}));
    h_post_scale = register_parameter("h_post_scale", torch::full({}, 0.01));
  }

  /// x [G,S,L,dim] -> same shape; `branch` takes [G,L,dim] to the same shape. Saves x, projections (S·(2+S) numbers a
  /// position), weights (S·(2+S)), and what the branch gives.
  template <class Branch>
  torch::Tensor forward(const torch::Tensor& x, Branch&& branch) {
    const std::vector<torch::Tensor> weights = mixing(x);
    const torch::Tensor given = branch(nn::mix_streams(x, weights[0]).squeeze(1));
    return nn::mix_streams(x, weights[1], given.unsqueeze(1));
  }

  HyperConnectionOptions options;
  torch::Tensor static_alpha, dynamic_alpha_fn, pre_branch_scale, residual_scale;
  torch::Tensor static_beta, dynamic_beta_fn, h_post_scale;

 private:
  /// How the branch reads streams, [G,L,S,1], and how the next ones are made of those and what it gives, [G,L,S+1,S].
  std::vector<torch::Tensor> mixing(const torch::Tensor& x) {
    const torch::Tensor projection = torch::cat({dynamic_alpha_fn[0].t(), dynamic_beta_fn.unsqueeze(0)});
    const torch::Tensor projected = nn::detail::run({.x = x,
                                                     .norm_weight = norm_->weight + 1,
                                                     .eps = norm_->options.eps(),
                                                     .weights = {projection}});  // [G,S,L,1+S+1]
    const auto self = std::static_pointer_cast<HyperConnectionImpl>(shared_from_this());
    return checkpoint([self](const torch::Tensor& x) { return self->weights(x); }, projected);
  }

  std::vector<torch::Tensor> weights(const torch::Tensor& projected) const {
    const int64_t streams = options.streams();
    const torch::Tensor by_position = projected.transpose(1, 2);  // [G,L,S,1+S+1]
    const auto part = [&](int64_t first, int64_t count) { return by_position.narrow(-1, first, count); };
    const torch::Tensor reading =
        (part(0, 1) * pre_branch_scale + static_alpha.narrow(1, 0, 1)).sigmoid();  // [G,L,S,1]
    torch::Tensor mixing = (part(1, streams) * residual_scale + static_alpha.narrow(1, 1, streams)).softmax(-2);
    for (int64_t i = 0; i < options.sinkhorn_iters(); ++i) {
      if (i > 0) mixing = mixing / mixing.sum(-2, /*keepdim=*/true).clamp_min(kSmallestSum);
      mixing = mixing / mixing.sum(-1, /*keepdim=*/true).clamp_min(kSmallestSum);
    }
    const torch::Tensor writing =
        (by_position.select(-1, 1 + streams) * h_post_scale + static_beta).sigmoid() * 2;  // [G,L,S]
    return {reading, torch::cat({mixing, writing.unsqueeze(-2)}, -2)};
  }

  static constexpr double kSmallestSum = 1e-12;
  nn::RMSNorm norm_;  // empty with one stream
};
TORCH_MODULE(HyperConnection);

}  // namespace headroom::inline v0::models
