#pragma once

#include <torch/torch.h>

#include <vector>

#include "headroom/attention.hpp"

namespace headroom::benchmarks {

using torch::Tensor;

struct AttentionSizes {
  int64_t batch = 1, heads = 4, length = 2049, head_dim = 32;

  std::vector<int64_t> shape() const { return {batch, heads, length, head_dim}; }
};

/// A request with its inputs, whose gradients are asked for where they require one.
struct AttentionStep {
  Tensor q, k, v;
  AttentionOptions options = {};
  bool with_lse = false;
  Tensor grad_output = {}, grad_lse = {};  // set by prepare()

  /// Makes q, k and v differentiable, and the gradients that backward starts from.
  AttentionStep& prepare() {
    for (Tensor* x : {&q, &k, &v}) *x = x->detach().requires_grad_();
    std::vector<int64_t> sizes = q.sizes().vec();
    sizes.back() = v.size(-1);
    grad_output = torch::randn(sizes).to(q.scalar_type());
    sizes.pop_back();
    if (with_lse) grad_lse = torch::randn(sizes);
    return *this;
  }

  std::vector<Tensor> leaves() const {
    std::vector<Tensor> result{q, k, v};
    for (const Tensor& x : headroom::detail::differentiable(options)) result.push_back(x);
    return result;
  }

  std::vector<Tensor> forward() const {
    if (!with_lse) return {attention(q, k, v, options)};
    const auto [output, lse] = attention_with_lse(q, k, v, options);
    return {output, lse};
  }

  std::vector<Tensor> backward(const std::vector<Tensor>& results) const {
    if (!with_lse) return torch::autograd::grad(results, leaves(), {grad_output});
    return torch::autograd::grad(results, leaves(), {grad_output, grad_lse});
  }

  /// q, k, v and, for a backward pass, the gradient of the output.
  int64_t input_bytes(bool with_backward) const {
    return q.nbytes() + k.nbytes() + v.nbytes() + (with_backward ? grad_output.nbytes() : 0);
  }

  /// Bytes that no implementation can do without beside its inputs: output and log-sum-exp (as it is stored, in double,
  /// and as it is returned), and for a backward pass the gradients and delta, a number a query.
  int64_t floor_bytes(bool with_backward) const {
    const int64_t rows = q.numel() / q.size(-1);
    int64_t bytes = rows * v.size(-1) * q.element_size() + rows * 8;
    if (with_lse) bytes += rows * 4;
    if (!with_backward) return bytes;
    for (const Tensor& x : leaves()) bytes += x.nbytes();
    return bytes + rows * (q.scalar_type() == torch::kDouble ? 8 : 4);
  }
};

}  // namespace headroom::benchmarks
