#pragma once

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/nn/chain_by_operators.hpp"
#include "headroom/nn/chain_in_chunks.hpp"
#include "headroom/nn/chain_layout.hpp"

// Words of this file and of chain_*.hpp:
//   token chain   a fused MLP of tokens: [RMS norm or gates,] linear, GELU, …, linear [, + residual]; with one layer a
//   linear
//                 layer fused with the norm before it and the sum behind it
//   in chunks     by our own loops, a few hundred tokens at a time through all layers, so that what lies between the
//                 layers stays in the cache
//   by operators  by LibTorch's operators, a layer of all tokens at a time
//   layout        the places of a chain's tensors in the list that autograd wants
namespace headroom::inline v0::nn::detail {

/// How the two passes of a chain are computed.
struct ChainKernel {
  bool in_chunks = false;                         ///< dense float rows on the CPU
  std::optional<torch::ScalarType> cast_to = {};  ///< of operators

  /// As one number, for a graph to keep.
  int64_t encoded() const { return cast_to.has_value() ? static_cast<int64_t>(*cast_to) : in_chunks ? -2 : -1; }
  static ChainKernel decoded(int64_t number) {
    if (number < 0) return {number == -2};
    return {false, static_cast<torch::ScalarType>(number)};
  }

  ChainForward forward(const TokenChain& chain, const ChainRequest& request) const {
    return in_chunks ? ChainInChunks(chain).forward(request) : ChainByOperators(chain, cast_to).forward(request);
  }
  torch::autograd::variable_list backward(const TokenChain& chain, const ChainLayout& layout,
                                          at::TensorList inputs_of_gelu, const torch::Tensor& grad,
                                          const std::vector<bool>& wanted) const {
    return in_chunks ? ChainInChunks(chain).backward(layout, inputs_of_gelu, grad, wanted)
                     : ChainByOperators(chain, cast_to).backward(layout, inputs_of_gelu, grad, wanted);
  }
};

/// A call of a chain, beside its tensors.
struct ChainCall {
  ChainLayout layout;
  double eps;
  ChainKernel kernel;
  bool records;  ///< somebody may want gradients
};

/// A chain that saves, beside what it is given, only the input of each GELU for backward, which computes norm and GELU
/// again. Second derivatives go through operators that save everything.
struct TokenChainFunction : torch::autograd::Function<TokenChainFunction> {
  /// x [rows, in] -> [rows, out]
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors, const ChainCall& call) {
    const auto& [layout, eps, kernel, records] = call;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    // A recomputation that ends with what is saved here has no use for the result
    const int64_t saves = layout.size() - layout.has_residual + layout.layers - 1;
    const ChainForward result =
        kernel.forward(layout.chain(tensors, eps), {records, !records || SavedTensorHooks::go_on_after(saves)});
    if (records) {
      torch::autograd::variable_list saved = tensors.vec();
      if (layout.has_residual) saved[1] = torch::Tensor();  // its gradient needs no value
      saved.insert(saved.end(), result.inputs_of_gelu.begin(), result.inputs_of_gelu.end());
      ctx->save_for_backward(saved);
      ctx->saved_data["eps"] = eps;
      ctx->saved_data["layout"] = layout.encoded();
      ctx->saved_data["kernel"] = kernel.encoded();
    }
    return result.out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const auto layout = ChainLayout::decoded(ctx->saved_data["layout"].toInt());
    const auto kernel = ChainKernel::decoded(ctx->saved_data["kernel"].toInt());
    const TokenChain chain = layout.chain(saved, ctx->saved_data["eps"].toDouble());
    std::vector<bool> wanted(layout.size());
    bool any = false;
    for (int64_t i = 0; i < layout.size(); ++i) {
      wanted[i] = ctx->needs_input_grad(i) && !(layout.has_residual && i == 1);
      any = any || wanted[i];
    }
    torch::autograd::variable_list result(layout.size());
    if (any && torch::GradMode::is_enabled()) {
      result = differentiable_gradients(chain, layout, kernel, grads[0], wanted);
    } else if (any) {
      result = kernel.backward(chain, layout, at::TensorList(saved).slice(layout.size()), grads[0], wanted);
    }
    if (layout.has_residual && ctx->needs_input_grad(1)) result[1] = grads[0];
    result.emplace_back();  // the call has no gradient
    return result;
  }

 private:
  /// With a graph behind the gradients, for second derivatives.
  static torch::autograd::variable_list differentiable_gradients(TokenChain chain, const ChainLayout& layout,
                                                                 const ChainKernel& kernel, const torch::Tensor& grad,
                                                                 const std::vector<bool>& wanted) {
    torch::autograd::variable_list result = layout.list(chain), inputs;
    if (layout.has_residual) chain.residual = torch::Tensor();
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) inputs.push_back(result[i]);
    }
    const torch::Tensor out = ChainByOperators(chain, kernel.cast_to).forward({}).out;
    const auto gradients = torch::autograd::grad({out}, inputs, {grad.to(out.scalar_type())}, true, true);
    for (size_t i = 0, next = 0; i < wanted.size(); ++i) result[i] = wanted[i] ? gradients[next++] : torch::Tensor();
    return result;
  }
};

/// The shape of a chain's result. Throws headroom.nn.linear.shape.
inline std::vector<int64_t> output_sizes(const TokenChain& chain) {
  std::vector<int64_t> sizes = chain.x.sizes().vec();
  for (size_t i = 0; i < chain.weights.size(); ++i) {
    const torch::Tensor& weight = chain.weights[i];
    require(weight.dim() == 2 && !sizes.empty() && weight.size(1) == sizes.back(), "headroom.nn.linear.shape", "x is ",
            at::IntArrayRef(sizes), " and weight ", weight.sizes(), "; expected x [...,in] and weight [out,in]");
    sizes.back() = weight.size(0);
    require(chain.biases.empty() || chain.biases[i].sizes() == weight.sizes().slice(0, 1), "headroom.nn.linear.shape",
            "bias ", i, " of weight ", weight.sizes(), " has another shape; expected [out], or no bias");
  }
  return sizes;
}

/// [..., out]. Throws headroom.nn.linear.shape.
HEADROOM_KERNEL torch::Tensor run(TokenChain chain);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor run(TokenChain chain) {
  const std::vector<int64_t> sizes = output_sizes(chain);
  ChainKernel kernel{.cast_to = autocast_type(chain.x)};
  ChainLayout layout = ChainLayout::of(chain);
  auto tensors = layout.list(chain);
  kernel.in_chunks = !kernel.cast_to.has_value();
  for (const torch::Tensor& t : tensors) kernel.in_chunks = kernel.in_chunks && has_float_rows(t);
  if (!kernel.in_chunks && !layout.has_norm && !layout.has_gates) {
    if (layout.layers == 1) return ChainByOperators(chain).forward({}).out;  // saves as little, and autocast caches
    if (kernel.cast_to.has_value() && chain.x.scalar_type() != torch::kDouble) {  // the cast is what has to be saved
      chain.x = chain.x.to(*kernel.cast_to);
      layout = ChainLayout::of(chain);
      tensors = layout.list(chain);
    }
  }
  const int64_t rows = c10::multiply_integers(chain.x.sizes().slice(0, chain.x.dim() - 1));
  bool records = false;
  for (int64_t i = 0; i < layout.size(); ++i) {
    if (i < layout.norm()) tensors[i] = tensors[i].reshape({rows, tensors[i].size(-1)});  // x, residual, gates
    if (i < layout.norm() || kernel.in_chunks) tensors[i] = tensors[i].contiguous();
    records = records || tensors[i].requires_grad();
  }
  const ChainCall call{layout, chain.eps, kernel, records && torch::GradMode::is_enabled()};
  return TokenChainFunction::apply(at::TensorList(tensors), call).view(sizes);
}
#endif

}  // namespace headroom::inline v0::nn::detail
