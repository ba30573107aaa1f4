#pragma once

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "headroom/nn/chain_layout.hpp"
#include "headroom/nn/gated_rows.hpp"
#include "headroom/nn/matrix_product.hpp"
#include "headroom/nn/rms_norm.hpp"

namespace headroom::inline v0::nn::detail {

/// Scratch memory for the same matrix in chunk after chunk.
struct ChunkScratch {
  torch::Tensor memory;
  ChunkScratch(int64_t rows, int64_t columns, const torch::Tensor& like)
      : memory(headroom::detail::workspace_tensor(rows * columns, like.options().requires_grad(false))) {}
  torch::Tensor operator()(int64_t rows, int64_t columns) const {
    return memory.narrow(0, 0, rows * columns).view({rows, columns});
  }
};

/// A chain on dense float rows, on the CPU, a chunk of rows at a time: what lies between the layers stays in the cache.
class ChainInChunks {
 public:
  explicit ChainInChunks(const TokenChain& chain) : chain_(chain) {}

  /// x [rows, in] -> [rows, out]
  ChainForward forward(const ChainRequest& request) const {
    RECORD_FUNCTION("headroom::token_chain", headroom::detail::operator_inputs(operands()));
    const int64_t rows = chain_.x.size(0), in = chain_.x.size(1), chunk = std::min(rows, chunk_rows());
    const size_t layers = chain_.weights.size();
    std::vector<PackedB> weights;
    std::vector<torch::Tensor> inputs_of_gelu;
    for (size_t i = 0; i < layers; ++i) {
      weights.emplace_back(chain_.weights[i].t());
      if (i + 1 < layers) {
        inputs_of_gelu.push_back(
            torch::empty({request.records ? rows : chunk, chain_.weights[i].size(0)}, chain_.x.options()));
      }
    }
    const torch::Tensor out = torch::empty({rows, chain_.weights.back().size(0)}, chain_.x.options());
    const ChunkScratch first_input(changes_x() ? chunk : 0, in, out);
    const ChunkScratch activation(chunk, widest_hidden(), out);
    for (int64_t first = 0; first < rows; first = next_chunk(first, chunk)) {
      const int64_t count = std::min(chunk, rows - first);
      torch::Tensor x = input_of(first, count, first_input);
      for (size_t i = 0; i < layers; ++i) {
        const torch::Tensor bias = !chain_.biases.empty() ? chain_.biases[i] : torch::Tensor();
        if (i + 1 < layers) {
          const torch::Tensor before = inputs_of_gelu[i].narrow(0, request.records ? first : 0, count);
          multiply(x, weights[i], before, bias.defined() ? AddTo::bias : AddTo::nothing, bias);
          if (i + 2 == layers && !request.output_wanted) break;
          x = activation(count, before.size(1));
          at::gelu_out(x, before);
          continue;
        }
        if (!request.output_wanted) break;
        torch::Tensor y = out.narrow(0, first, count);
        if (chain_.residual.defined()) {
          const torch::Tensor residual = chain_.residual.narrow(0, first, count);
          bias.defined() ? at::add_out(y, residual, bias) : y.copy_(residual);
          multiply(x, weights[i], y, AddTo::c);
        } else {
          multiply(x, weights[i], y, bias.defined() ? AddTo::bias : AddTo::nothing, bias);
        }
      }
    }
    if (!request.records) inputs_of_gelu.clear();
    return {out, inputs_of_gelu};
  }

  /// The gradients of what is `wanted`, by the places of `layout`; those of a residual of its own are not its concern.
  torch::autograd::variable_list backward(const ChainLayout& layout, at::TensorList inputs_of_gelu,
                                          const torch::Tensor& grad, const std::vector<bool>& wanted) const {
    torch::autograd::variable_list result(layout.size());
    const auto all = layout.list(chain_);
    for (int64_t i = 0; i < layout.size(); ++i) {
      const bool written = i == 0 || (layout.has_gates && i == layout.gates());
      if (wanted[i]) result[i] = written ? torch::empty_like(all[i]) : torch::zeros_like(all[i]);
    }
    write_gradients(layout, inputs_of_gelu, grad.contiguous(), result);
    return result;
  }

 private:
  /// Rows of a chunk, so that its widest matrix takes about 800 KB, and enough of them for the threads.
  /// Gradients of weights are sums over chunks: their number does not depend on that of the threads.
  int64_t chunk_rows() const {
    int64_t widest = chain_.weights[0].size(1);
    for (const torch::Tensor& w : chain_.weights) widest = std::max(widest, w.size(0));
    return std::max<int64_t>(128, 196608 / widest / 64 * 64);
  }
  /// Whether something comes before the first layer.
  bool changes_x() const { return chain_.norm_weight.defined() || chain_.gates.defined(); }
  /// What the first layer is given for `count` rows, in `scratch` where that is not x itself.
  torch::Tensor input_of(int64_t first, int64_t count, const ChunkScratch& scratch) const {
    const torch::Tensor x = chain_.x.narrow(0, first, count);
    if (!changes_x()) return x;
    const torch::Tensor to = scratch(count, x.size(1));
    if (chain_.gates.defined()) {
      gate_rows(x, chain_.gates.narrow(0, first, count), to);
    } else {
      normalize_rows(x, chain_.norm_weight, chain_.eps, to);
    }
    return to;
  }
  /// What profilers and traces see: x [, norm_weight], weights ….
  std::vector<torch::Tensor> operands() const {
    std::vector<torch::Tensor> all{chain_.x};
    if (chain_.gates.defined()) all.push_back(chain_.gates);
    if (chain_.norm_weight.defined()) all.push_back(chain_.norm_weight);
    all.insert(all.end(), chain_.weights.begin(), chain_.weights.end());
    return all;
  }
  /// The start of the chunk after `first`. A dry run only sees the first two and the last: the first one lays out
  /// copies of weights that stay, so that the second needs most, and those between no more.
  int64_t next_chunk(int64_t first, int64_t chunk) const {
    const int64_t last = (chain_.x.size(0) - 1) / chunk * chunk;
    return is_dry(chain_.x) && first == chunk && first < last ? last : first + chunk;
  }
  int64_t widest_hidden() const {
    int64_t widest = 0;
    for (size_t i = 0; i + 1 < chain_.weights.size(); ++i) widest = std::max(widest, chain_.weights[i].size(0));
    return widest;
  }

  /// Fills the tensors of `result` that are defined; those of parameters are zero before.
  void write_gradients(const ChainLayout& layout, at::TensorList inputs_of_gelu, const torch::Tensor& grad,
                       const torch::autograd::variable_list& result) const {
    RECORD_FUNCTION("headroom::token_chain_backward", headroom::detail::operator_inputs(operands()));
    const int64_t rows = chain_.x.size(0), in = chain_.x.size(1), chunk = std::min(rows, chunk_rows());
    std::vector<PackedB> weights(chain_.weights.begin(), chain_.weights.end());
    const int64_t hidden = widest_hidden();
    const ChunkScratch first_input(changes_x() ? chunk : 0, in, grad), grad_input(changes_x() ? chunk : 0, in, grad);
    const ChunkScratch activation(chunk, hidden, grad);
    const ChunkScratch grad_hidden[2] = {{layout.layers > 2 ? chunk : 0, hidden, grad},
                                         {layout.layers > 1 ? chunk : 0, hidden, grad}};
    for (int64_t first = 0; first < rows; first = next_chunk(first, chunk)) {
      const int64_t count = std::min(chunk, rows - first);
      const auto part = [&](const torch::Tensor& t) { return t.narrow(0, first, count); };
      torch::Tensor g = part(grad);
      for (int64_t i = layout.layers - 1; i >= 0; --i) {
        const torch::Tensor& grad_weight = result[layout.weight(i)];
        if (layout.has_biases && result[layout.bias(i)].defined()) add_column_sums(g, result[layout.bias(i)]);
        if (i > 0) {
          // forward did: x = gelu(before)·wᵀ + b
          const torch::Tensor before = part(inputs_of_gelu[i - 1]);
          if (grad_weight.defined()) {
            torch::Tensor x = activation(count, before.size(1));
            PackedB right(at::gelu_out(x, before));
            multiply(g.t(), right, grad_weight, AddTo::c);
          }
          torch::Tensor grad_before = grad_hidden[i % 2](count, before.size(1));
          multiply(g, weights[i], grad_before, AddTo::nothing);
          g = at::gelu_backward_out(grad_before, grad_before, before);
          continue;
        }
        // forward did: y = input_of(x)·wᵀ + b
        if (grad_weight.defined()) {
          PackedB right(input_of(first, count, first_input));
          multiply(g.t(), right, grad_weight, AddTo::c);
        }
        const auto wanted_part = [&](const torch::Tensor& t) { return t.defined() ? part(t) : t; };
        write_input_gradients(g, weights[0], first, grad_input,
                              {.x = wanted_part(result[0]),
                               .norm = layout.has_norm ? result[layout.norm()] : torch::Tensor(),
                               .gates = layout.has_gates ? wanted_part(result[layout.gates()]) : torch::Tensor(),
                               .through = layout.residual_is_x ? part(grad) : torch::Tensor()});
      }
    }
  }

  /// Where the gradients of what the first layer starts from go, those of rows for the rows of a chunk; undefined: not
  /// wanted. `through` is added to that of x.
  struct InputGradients {
    torch::Tensor x, norm, gates, through;
  };

  /// Given g, the gradient of the first layer's result, for the chunk that starts at row `first`.
  void write_input_gradients(const torch::Tensor& g, PackedB& weight, int64_t first, const ChunkScratch& scratch,
                             const InputGradients& to) const {
    if (!to.x.defined() && !to.norm.defined() && !to.gates.defined()) return;
    const int64_t count = g.size(0), in = chain_.x.size(1);
    if (!changes_x()) {
      if (to.through.defined()) to.x.copy_(to.through);
      return multiply(g, weight, to.x, to.through.defined() ? AddTo::c : AddTo::nothing);
    }
    const torch::Tensor x = chain_.x.narrow(0, first, count), grad = scratch(count, in);
    multiply(g, weight, grad, AddTo::nothing);
    if (chain_.gates.defined()) {
      gate_rows_backward(grad, x, chain_.gates.narrow(0, first, count), {to.x, to.gates});
    } else {
      normalize_rows_backward(grad, x, chain_.norm_weight, chain_.eps, {to.x, to.norm, to.through});
    }
  }

  /// sums [n] += the sum over the rows of g [rows, n], in double above 16 rows: rounding would add up
  static void add_column_sums(const torch::Tensor& g, const torch::Tensor& sums) {
    if (is_dry(g)) return;
    const int64_t n = g.size(1);
    const float* const from = g.const_data_ptr<float>();
    float* const to = sums.mutable_data_ptr<float>();
    at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      const int64_t columns = end - begin;
      Eigen::ArrayXd chunk = Eigen::ArrayXd::Zero(columns);
      Eigen::ArrayXf block(columns);
      for (int64_t first = 0; first < g.size(0); first += 16) {
        block.setZero();
        for (int64_t r = first; r < std::min(first + 16, g.size(0)); ++r) {
          block += ConstRow(from + r * n + begin, columns);
        }
        chunk += block.cast<double>();
      }
      Row(to + begin, columns) += chunk.cast<float>();
    });
  }

  const TokenChain& chain_;
};

}  // namespace headroom::inline v0::nn::detail
