#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/init.h>
#include <torch/nn/options/linear.h>

#include <cmath>
#include <optional>
#include <vector>

#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/nn/matrix_product.hpp"
#include "headroom/nn/rms_norm.hpp"

namespace headroom::inline v0::nn {

namespace detail {

/// What a token goes through on its own: [RMS norm,] linear, GELU, linear, GELU, …, linear [, + residual].
struct TokenChain {
  torch::Tensor x;                 ///< [..., in]
  torch::Tensor residual = {};     ///< undefined, or [..., out]; may be x
  torch::Tensor norm_weight = {};  ///< undefined, or [in]
  double eps = 0;
  std::vector<torch::Tensor> weights = {};  ///< one or more, [out, in] each
  std::vector<torch::Tensor> biases = {};   ///< none, or one [out] for each weight
};

/// The biases of a chain with one layer.
inline std::vector<torch::Tensor> bias_list(const torch::Tensor& bias) {
  return bias.defined() ? std::vector{bias} : std::vector<torch::Tensor>();
}

/// Places of the tensors of a chain in one list: x [, residual] [, norm_weight], weights … [, biases …]. A residual
/// that is x itself has no place of its own.
struct ChainLayout {
  int64_t layers = 0;
  bool has_residual = false, residual_is_x = false, has_norm = false, has_biases = false;

  static ChainLayout of(const TokenChain& chain) {
    const bool has_residual = chain.residual.defined(), residual_is_x = chain.residual.is_same(chain.x);
    return {static_cast<int64_t>(chain.weights.size()), has_residual && !residual_is_x, has_residual && residual_is_x,
            chain.norm_weight.defined(), !chain.biases.empty()};
  }
  /// As one number, for a graph to keep.
  int64_t encoded() const { return layers << 4 | has_residual << 3 | residual_is_x << 2 | has_norm << 1 | has_biases; }
  static ChainLayout decoded(int64_t bits) {
    return {bits >> 4, (bits >> 3 & 1) == 1, (bits >> 2 & 1) == 1, (bits >> 1 & 1) == 1, (bits & 1) == 1};
  }

  int64_t norm() const { return 1 + has_residual; }
  int64_t weight(int64_t layer) const { return norm() + has_norm + layer; }
  int64_t bias(int64_t layer) const { return weight(layers) + layer; }
  int64_t size() const { return weight(layers) + (has_biases ? layers : 0); }

  torch::autograd::variable_list list(const TokenChain& chain) const {
    torch::autograd::variable_list all = {chain.x};
    if (has_residual) all.push_back(chain.residual);
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
            .norm_weight = has_norm ? all[norm()] : torch::Tensor(),
            .eps = eps,
            .weights = all.slice(weight(0), layers).vec(),
            .biases = has_biases ? all.slice(bias(0), layers).vec() : std::vector<torch::Tensor>()};
  }
};

/// One LibTorch operator after the other: any device and dtype, any number of derivatives.
inline torch::Tensor run_by_operators(const TokenChain& chain) {
  torch::Tensor x = chain.x;
  if (chain.norm_weight.defined()) x = RmsNormFunction::apply(x, chain.norm_weight, chain.eps);
  for (size_t i = 0; i < chain.weights.size(); ++i) {
    x = at::linear(i == 0 ? x : torch::gelu(x), chain.weights[i],
                   chain.biases.empty() ? std::nullopt : std::optional(chain.biases[i]));
  }
  return chain.residual.defined() ? x + chain.residual : x;
}

/// Scratch memory for the same matrix in chunk after chunk.
struct ChunkScratch {
  torch::Tensor memory;
  ChunkScratch(int64_t rows, int64_t columns, const torch::Tensor& like)
      : memory(headroom::detail::workspace_tensor(rows * columns, like.options().requires_grad(false))) {}
  torch::Tensor operator()(int64_t rows, int64_t columns) const {
    return memory.narrow(0, 0, rows * columns).view({rows, columns});
  }
};

/// The chain on dense float rows, on the CPU, a chunk of rows at a time: what lies between the layers stays in the
/// cache, and of all that only the input of each GELU is saved for backward.
struct TokenChainFunction : torch::autograd::Function<TokenChainFunction> {
  /// Rows of a chunk, so that a thread's share of its widest matrix takes about 400 KB.
  static int64_t chunk_rows(const TokenChain& chain) {
    int64_t widest = chain.weights[0].size(1);
    for (const torch::Tensor& w : chain.weights) widest = std::max(widest, w.size(0));
    return at::get_num_threads() * std::max<int64_t>(64, 98304 / widest / 64 * 64);
  }
  /// What profilers and traces see: x [, norm_weight], weights ….
  static std::vector<torch::Tensor> operands(const TokenChain& chain) {
    std::vector<torch::Tensor> all{chain.x};
    if (chain.norm_weight.defined()) all.push_back(chain.norm_weight);
    all.insert(all.end(), chain.weights.begin(), chain.weights.end());
    return all;
  }
  /// The start of the chunk after `first`. A dry run only sees the first two and the last: the first one lays out
  /// copies of weights that stay, so that the second needs most, and those between no more.
  static int64_t next_chunk(const TokenChain& chain, int64_t first, int64_t chunk) {
    const int64_t last = (chain.x.size(0) - 1) / chunk * chunk;
    return is_dry(chain.x) && first == chunk && first < last ? last : first + chunk;
  }
  static int64_t widest_hidden(const TokenChain& chain) {
    int64_t widest = 0;
    for (size_t i = 0; i + 1 < chain.weights.size(); ++i) widest = std::max(widest, chain.weights[i].size(0));
    return widest;
  }

  /// x [rows, in] -> [rows, out]. `records`: somebody may want gradients.
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors, const ChainLayout& layout,
                               double eps, bool records) {
    RECORD_FUNCTION("headroom::token_chain", headroom::detail::operator_inputs(operands(layout.chain(tensors, eps))));
    const TokenChain chain = layout.chain(tensors, eps);
    const int64_t rows = chain.x.size(0), in = chain.x.size(1), chunk = std::min(rows, chunk_rows(chain));
    const size_t layers = chain.weights.size();
    std::vector<RightOperand> weights;
    std::vector<torch::Tensor> inputs_of_gelu;
    for (size_t i = 0; i < layers; ++i) {
      weights.emplace_back(chain.weights[i].t());
      if (i + 1 < layers) {
        inputs_of_gelu.push_back(torch::empty({records ? rows : chunk, chain.weights[i].size(0)}, chain.x.options()));
      }
    }
    const torch::Tensor out = torch::empty({rows, chain.weights.back().size(0)}, chain.x.options());
    // A recomputation that ends with what is saved here has no use for the result: the last layer is left out
    const size_t saves = tensors.size() - (layout.has_residual ? 1 : 0) + inputs_of_gelu.size();
    const bool output_wanted = !records || SavedTensorHooks::go_on_after(saves);
    const ChunkScratch normed(chain.norm_weight.defined() ? chunk : 0, in, out);
    const ChunkScratch activation(chunk, widest_hidden(chain), out);
    for (int64_t first = 0; first < rows; first = next_chunk(chain, first, chunk)) {
      const int64_t count = std::min(chunk, rows - first);
      torch::Tensor x = chain.x.narrow(0, first, count);
      if (chain.norm_weight.defined()) {
        normalize_rows(x, chain.norm_weight, eps, normed(count, in));
        x = normed(count, in);
      }
      for (size_t i = 0; i < layers; ++i) {
        const torch::Tensor bias = layout.has_biases ? chain.biases[i] : torch::Tensor();
        if (i + 1 < layers) {
          const torch::Tensor before = inputs_of_gelu[i].narrow(0, records ? first : 0, count);
          multiply(x, weights[i], before, bias.defined() ? Start::bias : Start::zero, bias);
          if (i + 2 == layers && !output_wanted) break;
          x = activation(count, before.size(1));
          at::gelu_out(x, before);
          continue;
        }
        if (!output_wanted) break;
        torch::Tensor y = out.narrow(0, first, count);
        if (chain.residual.defined()) {
          const torch::Tensor residual = chain.residual.narrow(0, first, count);
          bias.defined() ? at::add_out(y, residual, bias) : y.copy_(residual);
          multiply(x, weights[i], y, Start::itself);
        } else {
          multiply(x, weights[i], y, bias.defined() ? Start::bias : Start::zero, bias);
        }
      }
    }
    if (records) {
      torch::autograd::variable_list saved = tensors.vec();
      if (layout.has_residual) saved[1] = torch::Tensor();  // its gradient needs no value
      saved.insert(saved.end(), inputs_of_gelu.begin(), inputs_of_gelu.end());
      ctx->save_for_backward(saved);
      ctx->saved_data["eps"] = eps;
      ctx->saved_data["layout"] = layout.encoded();
    }
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto layout = ChainLayout::decoded(ctx->saved_data["layout"].toInt());
    const TokenChain chain = layout.chain(saved, ctx->saved_data["eps"].toDouble());
    torch::autograd::variable_list result(layout.size());
    std::vector<int64_t> wanted;
    for (int64_t i = 0; i < layout.size(); ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      if (layout.has_residual && i == 1) {
        result[1] = grads[0];
      } else {
        wanted.push_back(i);
      }
    }
    if (!wanted.empty() && torch::GradMode::is_enabled()) {
      differentiate(chain, layout, grads[0], wanted, result);
    } else if (!wanted.empty()) {
      for (const int64_t i : wanted) {
        result[i] = i == 0 ? torch::empty_like(saved[0]) : torch::zeros_like(saved[i]);
      }
      write_gradients(chain, layout, at::TensorList(saved).slice(layout.size()), grads[0].contiguous(), result);
    }
    result.resize(layout.size() + 3);  // layout, eps, records
    return result;
  }

 private:
  /// With a graph behind the gradients, for second derivatives.
  static void differentiate(TokenChain chain, const ChainLayout& layout, const torch::Tensor& grad,
                            const std::vector<int64_t>& wanted, torch::autograd::variable_list& result) {
    const auto all = layout.list(chain);
    if (layout.has_residual) chain.residual = torch::Tensor();
    torch::autograd::variable_list inputs;
    for (const int64_t i : wanted) inputs.push_back(all[i]);
    const auto gradients = torch::autograd::grad({run_by_operators(chain)}, inputs, {grad}, true, true);
    for (size_t i = 0; i < wanted.size(); ++i) result[wanted[i]] = gradients[i];
  }

  /// Fills the tensors of `result` that are defined; all but that of x are zero before.
  static void write_gradients(const TokenChain& chain, const ChainLayout& layout, at::TensorList inputs_of_gelu,
                              const torch::Tensor& grad, const torch::autograd::variable_list& result) {
    RECORD_FUNCTION("headroom::token_chain_backward", headroom::detail::operator_inputs(operands(chain)));
    const int64_t rows = chain.x.size(0), in = chain.x.size(1), chunk = std::min(rows, chunk_rows(chain));
    const bool has_norm = layout.has_norm;
    const torch::Tensor grad_norm = has_norm ? result[layout.norm()] : torch::Tensor();
    std::vector<RightOperand> weights(chain.weights.begin(), chain.weights.end());
    const int64_t hidden = widest_hidden(chain);
    const ChunkScratch normed(has_norm ? chunk : 0, in, grad), grad_normed(has_norm ? chunk : 0, in, grad);
    const ChunkScratch activation(chunk, hidden, grad);
    const ChunkScratch grad_hidden[2] = {{layout.layers > 2 ? chunk : 0, hidden, grad},
                                         {layout.layers > 1 ? chunk : 0, hidden, grad}};
    for (int64_t first = 0; first < rows; first = next_chunk(chain, first, chunk)) {
      const int64_t count = std::min(chunk, rows - first);
      const auto part = [&](const torch::Tensor& t) { return t.narrow(0, first, count); };
      torch::Tensor g = part(grad);
      for (int64_t i = layout.layers - 1; i >= 0; --i) {
        const torch::Tensor grad_weight = result[layout.weight(i)];
        if (layout.has_biases && result[layout.bias(i)].defined()) add_column_sums(g, result[layout.bias(i)]);
        if (i > 0) {
          // forward did: x = gelu(before)·wᵀ + b
          const torch::Tensor before = part(inputs_of_gelu[i - 1]);
          if (grad_weight.defined()) {
            torch::Tensor x = activation(count, before.size(1));
            RightOperand right(at::gelu_out(x, before));
            multiply(g.t(), right, grad_weight, Start::itself);
          }
          torch::Tensor grad_before = grad_hidden[i % 2](count, before.size(1));
          multiply(g, weights[i], grad_before, Start::zero);
          g = at::gelu_backward_out(grad_before, grad_before, before);
          continue;
        }
        // forward did: x = norm(x)·wᵀ + b
        const torch::Tensor x = part(chain.x);
        if (grad_weight.defined()) {
          if (has_norm) normalize_rows(x, chain.norm_weight, chain.eps, normed(count, in));
          RightOperand right(has_norm ? normed(count, in) : x);
          multiply(g.t(), right, grad_weight, Start::itself);
        }
        const torch::Tensor grad_x = result[0].defined() ? part(result[0]) : torch::Tensor();
        const torch::Tensor through = layout.residual_is_x ? part(grad) : torch::Tensor();
        if (has_norm && (grad_x.defined() || grad_norm.defined())) {
          multiply(g, weights[0], grad_normed(count, in), Start::zero);
          normalize_rows_backward(grad_normed(count, in), x, chain.norm_weight, chain.eps, grad_x, grad_norm, through);
        } else if (grad_x.defined()) {
          if (through.defined()) grad_x.copy_(through);
          multiply(g, weights[0], grad_x, through.defined() ? Start::itself : Start::zero);
        }
      }
    }
  }

  /// sums [n] += the sum over the rows of g [rows, n], in double above 16 rows: rounding would add up
  static void add_column_sums(const torch::Tensor& g, const torch::Tensor& sums) {
    if (is_dry(g)) return;
    const int64_t n = g.size(1);
    Eigen::ArrayXd chunk = Eigen::ArrayXd::Zero(n);
    Eigen::ArrayXf block(n);
    for (int64_t first = 0; first < g.size(0); first += 16) {
      block.setZero();
      for (int64_t r = first; r < std::min(first + 16, g.size(0)); ++r) {
        block += ConstRow(g.const_data_ptr<float>() + r * n, n);
      }
      chunk += block.cast<double>();
    }
    Row(sums.mutable_data_ptr<float>(), n) += chunk.cast<float>();
  }
};

/// Throws headroom.nn.linear.shape.
inline torch::Tensor run(const TokenChain& chain) {
  std::vector<int64_t> sizes = chain.x.sizes().vec();
  for (size_t i = 0; i < chain.weights.size(); ++i) {
    const torch::Tensor& weight = chain.weights[i];
    require(weight.dim() == 2 && !sizes.empty() && weight.size(1) == sizes.back(), "headroom.nn.linear.shape", "x is ",
            at::IntArrayRef(sizes), " and weight ", weight.sizes(), "; expected x [...,in] and weight [out,in]");
    sizes.back() = weight.size(0);
    require(chain.biases.empty() || chain.biases[i].sizes() == weight.sizes().slice(0, 1), "headroom.nn.linear.shape",
            "bias ", i, " of weight ", weight.sizes(), " has another shape; expected [out], or no bias");
  }
  const ChainLayout layout = ChainLayout::of(chain);
  auto tensors = layout.list(chain);
  bool in_chunks = !at::autocast::is_autocast_enabled(at::kCPU);
  for (const torch::Tensor& t : tensors) in_chunks = in_chunks && has_float_rows(t);
  if (!in_chunks) return run_by_operators(chain);
  bool records = false;
  for (int64_t i = 0; i < layout.size(); ++i) {
    if (i < layout.norm()) tensors[i] = tensors[i].reshape({-1, tensors[i].size(-1)});  // x, residual: rows
    tensors[i] = tensors[i].contiguous();
    records = records || tensors[i].requires_grad();
  }
  return TokenChainFunction::apply(at::TensorList(tensors), layout, chain.eps, records && torch::GradMode::is_enabled())
      .view(sizes);
}

}  // namespace detail

/// x·weightᵀ + bias: torch::linear with the matrix products of whichever of LibTorch and headroom's register tile is
/// faster for the shape on this machine, forward and backward. The first product of a shape is measured (about ten
/// times its time) and the choice is kept, so that within a process equal operands give equal bits; another process may
/// choose otherwise when both are equally fast.
/// x [..., in], weight [out, in], bias [out] or none -> [..., out]; saves x. Anything but float on the CPU, and second
/// derivatives, are LibTorch's operators. Throws headroom.nn.linear.shape.
inline torch::Tensor linear(const torch::Tensor& x, const torch::Tensor& weight,
                            const std::optional<torch::Tensor>& bias = {}) {
  return detail::run({.x = x, .weights = {weight}, .biases = detail::bias_list(bias.value_or(torch::Tensor()))});
}

/// torch::nn::Linear (its options, parameters and initialisation) computed by nn::linear.
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& options) : options(options) { reset(); }

  void reset() override {
    weight = register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
    bias = register_parameter("bias", options.bias() ? torch::empty({options.out_features()}) : torch::Tensor(),
                              options.bias());
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    const double bound = options.in_features() > 0 ? 1 / std::sqrt(options.in_features()) : 0;
    if (bias.defined()) torch::nn::init::uniform_(bias, -bound, bound);
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::Linear(" << options.in_features() << ", " << options.out_features() << std::boolalpha
           << ", bias=" << options.bias() << ")";
  }

  /// x [..., in] -> [..., out]
  torch::Tensor forward(const torch::Tensor& x) { return nn::linear(x, weight, bias); }

  torch::nn::LinearOptions options;
  torch::Tensor weight;  // [out,in]
  torch::Tensor bias;    // [out], undefined without
};
TORCH_MODULE(Linear);

}  // namespace headroom::inline v0::nn
