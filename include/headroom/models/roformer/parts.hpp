#pragma once

#include <torch/nn/modules/container/modulelist.h>

#include "headroom/nn/linear.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/nn/token_chain.hpp"

// What the parts of RoFormers are made of, as the published models have it.
namespace headroom::inline v0::models::detail {

using nn::detail::gamma_norm;

/// A chain that starts with the norm of x.
inline nn::detail::TokenChain normed(const torch::Tensor& x, const nn::RMSNorm& norm) {
  return {.x = x, .norm_weight = norm->weight, .eps = norm->options.eps()};
}

/// Appends a linear layer, all layers of a chain with biases or all without.
inline void append(nn::detail::TokenChain& chain, const nn::Linear& linear) {
  chain.weights.push_back(linear->weight);
  if (linear->bias.defined()) chain.biases.push_back(linear->bias);
}

inline nn::Linear unbiased(int64_t in, int64_t out) {
  return nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
}

}  // namespace headroom::inline v0::models::detail
