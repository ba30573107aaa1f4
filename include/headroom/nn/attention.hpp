#pragma once

#include "headroom/attention.hpp"
#include "headroom/nn/linear.hpp"
#include "headroom/nn/rotary.hpp"
#include "headroom/nn/token_axis.hpp"

namespace headroom::inline v0::nn {

struct AttentionOptions {
  AttentionOptions(int64_t dim, int64_t heads) : dim_(dim), heads_(heads) {}
  /// Features of a token; the heads divide them.
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, heads);
  /// Rotary position embedding of q and k.
  TORCH_ARG(bool, rotary) = true;
  TORCH_ARG(double, rotary_theta) = 10000.0;
  /// Bias of the two projections.
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(bool, causal) = false;
  TORCH_ARG(AttentionBackend, backend) = AttentionBackend::automatic;
};

/// Multi-head self-attention along one dimension of a tensor of tokens, all other dimensions being batch. The
/// sequence dimension is attended where it lies: no transposed copy is made.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  explicit AttentionImpl(const AttentionOptions& options) : options(options) { reset(); }

  void reset() override {
    require(options.heads() > 0 && options.dim() > 0 && options.dim() % options.heads() == 0,
            "headroom.nn.attention.heads", options.heads(), " heads do not divide the width ", options.dim(),
            "; choose a width that is a multiple of heads");
    require(!options.rotary() || options.dim() / options.heads() % 2 == 0, "headroom.nn.rotary.dim",
            "rotary embedding rotates pairs of features, the head dim is ", options.dim() / options.heads(),
            "; choose an even head dim");
    to_qkv = register_module("to_qkv",
                             Linear(torch::nn::LinearOptions(options.dim(), 3 * options.dim()).bias(options.bias())));
    to_out =
        register_module("to_out", Linear(torch::nn::LinearOptions(options.dim(), options.dim()).bias(options.bias())));
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::Attention(" << options.dim() << ", heads=" << options.heads() << std::boolalpha
           << ", rotary=" << options.rotary() << ")";
  }

  /// x [..., dim] with at least one token dimension -> same shape; attends along dimension `axis`.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2) {
    return detail::run(
        {.x = attended({.x = x}, axis), .weights = {to_out->weight}, .biases = detail::bias_list(to_out->bias)});
  }

  /// x + forward(norm(x), axis); neither norm(x) nor the sum's terms are stored.
  torch::Tensor forward_residual(const torch::Tensor& x, const RMSNorm& norm, int64_t axis = -2) {
    const torch::Tensor heads = attended({.x = x, .norm_weight = norm->weight, .eps = norm->options.eps()}, axis);
    return detail::run(
        {.x = heads, .residual = x, .weights = {to_out->weight}, .biases = detail::bias_list(to_out->bias)});
  }

  AttentionOptions options;
  Linear to_qkv{nullptr}, to_out{nullptr};

 private:
  /// What the heads give, side by side: [..., dim]. The projection to q, k and v is appended to `chain`.
  torch::Tensor attended(detail::TokenChain chain, int64_t axis) {
    const torch::Tensor& x = chain.x;
    const int64_t sequence = detail::token_axis(x, axis, options.dim(), "headroom.nn.attention.shape");
    chain.weights = {to_qkv->weight};
    chain.biases = detail::bias_list(to_qkv->bias);
    const torch::Tensor packed = detail::run(chain).unflatten(-1, {3, options.heads(), -1});  // [...,3,H,D]
    const auto request = headroom::AttentionOptions().causal(options.causal()).backend(options.backend());
    return headroom::detail::packed_attention(packed, rotation(x.size(sequence), x.dim() - 1 - sequence, x.device()),
                                              sequence, request)
        .flatten(-2);
  }

  /// Table [L, 1 …, D/2] that broadcasts over the dimensions between the sequence and the features; kept from call to
  /// call, not part of the state.
  std::optional<torch::Tensor> rotation(int64_t length, int64_t behind, torch::Device device) {
    if (!options.rotary()) return std::nullopt;
    if (!table_.defined() || table_.size(0) != length || table_.device() != device) {
      table_ = rotary_table(length, options.dim() / options.heads(), options.rotary_theta(), device);
    }
    std::vector<int64_t> shape(behind + 3, 1);  // other token dimensions, q or k, head, pair
    shape.front() = length;
    shape.back() = table_.size(1);
    return table_.view(shape);
  }

  torch::Tensor table_;  // complex [L, D/2]
};
TORCH_MODULE(Attention);

}  // namespace headroom::inline v0::nn
