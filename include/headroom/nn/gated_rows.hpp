#pragma once

#include <ATen/Parallel.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>

#include "headroom/nn/rms_norm.hpp"
#include "headroom/runtime/dry_run.hpp"

// Gated rows: what each head gives, times the sigmoid of the head's gate.
namespace headroom::inline v0::nn::detail {

/// x [..., heads·dim] times the sigmoid of gates [..., heads]; a graph where gradients are enabled.
inline torch::Tensor gated(const torch::Tensor& x, const torch::Tensor& gates) {
  return (x.unflatten(-1, {gates.size(-1), -1}) * gates.sigmoid().unsqueeze(-1)).flatten(-2);
}

inline constexpr int64_t kGatedRows = 32;  ///< rows that are worth a thread
inline float open_gate(float gate) { return 1 / (1 + std::exp(-gate)); }

/// out = gated(x, gates); x and out [rows, heads·dim], gates [rows, heads], dense floats on the CPU.
inline void gate_rows(const torch::Tensor& x, const torch::Tensor& gates, const torch::Tensor& out) {
  if (is_dry(x)) return;
  const int64_t heads = gates.size(1), dim = x.size(1) / heads;
  const float *const from = x.const_data_ptr<float>(), *const gate = gates.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0) * heads, kGatedRows * heads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) Row(to + i * dim, dim) = ConstRow(from + i * dim, dim) * open_gate(gate[i]);
  });
}

/// Where the gradients of gate_rows go; undefined: not wanted.
struct GateGradients {
  torch::Tensor x, gates;
};

// forward did: out = x·sigmoid(gate)
inline void gate_rows_backward(const torch::Tensor& grad, const torch::Tensor& x, const torch::Tensor& gates,
                               const GateGradients& gradients) {
  if (is_dry(x)) return;
  const int64_t heads = gates.size(1), dim = x.size(1) / heads;
  const float *const from = x.const_data_ptr<float>(), *const gate = gates.const_data_ptr<float>(),
                     *const given = grad.const_data_ptr<float>();
  float* const to = gradients.x.defined() ? gradients.x.mutable_data_ptr<float>() : nullptr;
  float* const of_gates = gradients.gates.defined() ? gradients.gates.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, x.size(0) * heads, kGatedRows * heads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const ConstRow g(given + i * dim, dim);
      const float open = open_gate(gate[i]);
      if (of_gates != nullptr) of_gates[i] = (g * ConstRow(from + i * dim, dim)).sum() * (1 - open) * open;
      if (to != nullptr) Row(to + i * dim, dim) = g * open;
    }
  });
}

}  // namespace headroom::inline v0::nn::detail
