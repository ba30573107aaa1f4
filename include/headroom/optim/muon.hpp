#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/serialize.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/optim/adamw.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/optim/moment_store.hpp"
#include "headroom/optim/optimizer.hpp"
#include "headroom/optim/parameter_state.hpp"

namespace headroom::inline v0::optim {

/// Options of a group of Muon's.
struct MuonOptions : torch::optim::OptimizerCloneableOptions<MuonOptions> {
  explicit MuonOptions(double learning_rate = 1e-3) : lr_(learning_rate) {}
  TORCH_ARG(double, lr);
  /// Decoupled, of matrices and of what AdamW updates.
  TORCH_ARG(double, weight_decay) = 0.1;
  /// Of the gradients of matrices.
  TORCH_ARG(double, momentum) = 0.95;
  TORCH_ARG(bool, nesterov) = true;
  /// Steps of the iteration that makes a matrix about orthogonal.
  TORCH_ARG(int64_t, iterations) = 5;
  using betas_t = std::tuple<double, double>;
  /// Of AdamW.
  TORCH_ARG(betas_t, betas) = {0.9, 0.999};
  /// Of AdamW.
  TORCH_ARG(double, eps) = 1e-8;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double rate) override { lr_ = rate; }
  void serialize(torch::serialize::OutputArchive& archive) const override {
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(nesterov);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(iterations);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(betas);
    _TORCH_OPTIM_SERIALIZE_TORCH_ARG(eps);
  }
  void serialize(torch::serialize::InputArchive& archive) override {
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, momentum);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, nesterov);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(int64_t, iterations);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(betas_t, betas);
    _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, eps);
  }
};

/// A matrix with the singular vectors of `matrix` and singular values of about 1 (0.7 to 1.2), by so many steps of a
/// Newton-Schulz iteration. Source: Jordan 2024, kellerjordan.github.io/posts/muon.
inline torch::Tensor orthogonalised(const torch::Tensor& matrix, int64_t iterations) {
  constexpr double kLinear = 3.4445, kCubic = -4.7750, kQuintic = 2.0315;
  const bool is_tall = matrix.size(0) > matrix.size(1);
  torch::Tensor x = is_tall ? matrix.t() : matrix;  // [m,n], m <= n
  x = x / at::linalg_vector_norm(x).clamp_min_(1e-7);
  for (int64_t i = 0; i < iterations; ++i) {
    const torch::Tensor gram = at::mm(x, x.t());                                 // [m,m]
    const torch::Tensor factor = at::addmm(gram, gram, gram, kCubic, kQuintic);  // [m,m]
    x = at::addmm(x, factor, x, kLinear);                                        // [m,n]
  }
  return is_tall ? x.t() : x;
}

/// Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) for matrices, and AdamW for parameters of any other number of
/// dimensions. A matrix moves along its averaged gradient made orthogonal, times 0.2 sqrt(max(rows, columns)): as far
/// as AdamW would move it in the mean, so that both go by one learning rate. That is torch.optim.Muon of Python with
/// adjust_lr_fn="match_rms_adamw", but for the products, which are in float here and in bfloat16 there. Bytes of state
/// for each element of a matrix: full 4, bf16 2, 8bit 1.02.
class Muon : public AdamW {
 public:
  /// Over groups of parameters, each with options of its own or `defaults`; `format` is that of its state.
  explicit Muon(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                const MuonOptions& defaults = MuonOptions(), MomentFormat format = MomentFormat::full)
      : AdamW(std::make_unique<MuonOptions>(defaults), groups, format) {}
  /// Over one group.
  explicit Muon(std::vector<torch::Tensor> parameters, const MuonOptions& defaults = MuonOptions(),
                MomentFormat format = MomentFormat::full)
      : Muon({torch::optim::OptimizerParamGroup(std::move(parameters))}, defaults, format) {}

  std::string name() const override { return "Muon"; }

  void update(size_t group, const torch::Tensor& parameter) override {
    if (parameter.dim() != 2) return AdamW::update(group, parameter);
    const at::NoGradGuard guard;
    const auto& options = options_of<MuonOptions>(group);
    // All that allocates comes first; what is changed in place comes last
    const torch::Tensor gradient = gradient_of(parameter);
    ParameterState& state = state_for(parameter);
    StoredMoment& kept = state.moments.at("momentum_buffer");
    const auto [decay] = constants(computed_type(parameter), {1 - options.lr() * options.weight_decay()});
    const torch::Tensor exact = parameter.to(computed_type(parameter));
    const torch::Tensor momentum = moments_.load(kept, parameter).lerp(gradient, 1 - options.momentum());
    const torch::Tensor direction = orthogonalised(
        options.nesterov() ? gradient.lerp(momentum, options.momentum()) : momentum, options.iterations());
    const StoredMoment new_momentum = moments_.round(kept, momentum, state.step + 1);

    if (options.weight_decay() != 0) exact.mul_(decay);
    const auto longer_side = static_cast<double>(std::max(parameter.size(0), parameter.size(1)));
    exact.add_(direction, -options.lr() * 0.2 * std::sqrt(longer_side));
    if (!exact.is_same(parameter)) parameter.copy_(exact);
    kept.copy_(new_momentum);
    ++state.step;
  }

  std::unique_ptr<ParameterState> zero_state(const torch::Tensor& parameter) override {
    if (parameter.dim() != 2) return AdamW::zero_state(parameter);
    auto state = std::make_unique<ParameterState>();
    state->moments.emplace("momentum_buffer", moments_.zero(parameter, true));
    return state;
  }

 protected:
  torch::optim::AdamWOptions adamw_options(size_t group) const override {
    const auto& options = options_of<MuonOptions>(group);
    return torch::optim::AdamWOptions(options.lr())
        .betas(options.betas())
        .eps(options.eps())
        .weight_decay(options.weight_decay());
  }
};

}  // namespace headroom::inline v0::optim
