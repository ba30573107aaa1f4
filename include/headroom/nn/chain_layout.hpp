#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace headroom::inline v0::nn::detail {

/// What a token goes through on its own: [RMS norm or gates,] linear, GELU, linear, GELU, …, linear [, + residual].
struct TokenChain {
  torch::Tensor x;                 ///< [..., in]
  torch::Tensor residual = {};     ///< undefined, or [..., out]; may be x
  torch::Tensor gates = {};        ///< undefined, or [..., heads], whose sigmoids x is multiplied with, without a norm
  torch::Tensor norm_weight = {};  ///< undefined, or [in]
  double eps = 0;
  std::vector<torch::Tensor> weights = {};  ///< one or more, [out, in] each
  std::vector<torch::Tensor> biases = {};   ///< none, or one [out] for each weight
};

/// The biases of a chain with one layer.
inline std::vector<torch::Tensor> bias_list(const torch::Tensor& bias) {
  return bias.defined() ? std::vector{bias} : std::vector<torch::Tensor>();
}

/// Places of the tensors of a chain in one list: x [, residual] [, gates] [, norm_weight], weights … [, biases …]. A
/// residual that is x itself has no place of its own.
struct ChainLayout {
  int64_t layers = 0;
  bool has_residual = false, residual_is_x = false, has_norm = false, has_biases = false, has_gates = false;

  static ChainLayout of(const TokenChain& chain) {
    const bool has_residual = chain.residual.defined(), residual_is_x = chain.residual.is_same(chain.x);
    return {static_cast<int64_t>(chain.weights.size()),
            has_residual && !residual_is_x,
            has_residual && residual_is_x,
            chain.norm_weight.defined(),
            !chain.biases.empty(),
            chain.gates.defined()};
  }
  /// As one number, for a graph to keep.
  int64_t encoded() const {
    return layers << 5 | has_gates << 4 | has_residual << 3 | residual_is_x << 2 | has_norm << 1 | has_biases;
  }
  static ChainLayout decoded(int64_t bits) {
    const auto bit = [bits](int place) { return (bits >> place & 1) == 1; };
    return {bits >> 5, bit(3), bit(2), bit(1), bit(0), bit(4)};
  }

  int64_t gates() const { return 1 + has_residual; }
  int64_t norm() const { return gates() + has_gates; }
  int64_t weight(int64_t layer) const { return norm() + has_norm + layer; }
  int64_t bias(int64_t layer) const { return weight(layers) + layer; }
  int64_t size() const { return weight(layers) + (has_biases ? layers : 0); }

  torch::autograd::variable_list list(const TokenChain& chain) const {
    torch::autograd::variable_list all = {chain.x};
    if (has_residual) all.push_back(chain.residual);
    if (has_gates) all.push_back(chain.gates);
    if (has_norm) all.push_back(chain.norm_weight);
    all.insert(all.end(), chain.weights.begin(), chain.weights.end());
    all.insert(all.end(), chain.biases.begin(), chain.biases.end());
    return all;
  }
  TokenChain chain(at::TensorList all, double eps) const {
    return {.x = all[0],
            .residual = has_residual    ? all[1]
                        : residual_is_x ? all[0]
                                        : torch::Tensor(),
            .gates = has_gates ? all[gates()] : torch::Tensor(),
            .norm_weight = has_norm ? all[norm()] : torch::Tensor(),
            .eps = eps,
            .weights = all.slice(weight(0), layers).vec(),
            .biases = has_biases ? all.slice(bias(0), layers).vec() : std::vector<torch::Tensor>()};
  }
};

/// What a forward pass leaves for the backward pass, beside what it was given: the inputs of the GELUs, [rows, out]
/// each; none where nobody wants gradients.
struct ChainForward {
  torch::Tensor out;
  std::vector<torch::Tensor> inputs_of_gelu = {};
};

/// What is asked of a forward pass.
struct ChainRequest {
  bool records = false;       ///< the inputs of the GELUs, for a backward pass
  bool output_wanted = true;  ///< else the last layer may be left out, and `out` be anything
};

}  // namespace headroom::inline v0::nn::detail
