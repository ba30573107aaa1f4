#pragma once

#include <cstdlib>
#include <optional>

#include "headroom/attention.hpp"
#include "headroom/nn/linear.hpp"
#include "headroom/nn/rotary.hpp"
#include "headroom/nn/token_axis.hpp"

namespace headroom::inline v0::nn {

/// Options of SelfAttention.
struct SelfAttentionOptions {
  SelfAttentionOptions(int64_t dim, int64_t heads) : dim_(dim), heads_(heads) {}
  /// Features of a token.
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, heads);
  /// Heads of k and v, which divide heads (grouped queries, Ainslie et al. 2023); as many unless given.
  TORCH_ARG(std::optional<int64_t>, kv_heads) = std::nullopt;
  /// Features of a head; dim / heads unless given.
  TORCH_ARG(std::optional<int64_t>, head_dim) = std::nullopt;
  /// Rotary position embedding of q and k.
  TORCH_ARG(bool, rotary) = true;
  /// Base of the angles of the rotary embedding.
  TORCH_ARG(double, rotary_theta) = 10000.0;
  /// Bias of the two projections.
  TORCH_ARG(bool, bias) = false;
  /// Learned scores [heads] that take their share of the weights: the parameter `sink`.
  TORCH_ARG(bool, sink) = false;
  /// R above 0: a learned bias for each distance below R, the parameter `relative_bias` [heads, 2R-1].
  TORCH_ARG(int64_t, relative_bias) = 0;
  /// What else is asked of headroom::attention. Its dropout is for training.
  TORCH_ARG(AttentionOptions, request) = {};
};

/// Multi-head self-attention along one dimension of a tensor of tokens, all other dimensions being batch. The
/// sequence dimension is attended where it lies: no transposed copy is made.
class SelfAttentionImpl : public torch::nn::Cloneable<SelfAttentionImpl> {
 public:
  explicit SelfAttentionImpl(const SelfAttentionOptions& options) : options(options) { reset(); }

  void reset() override {
    const int64_t dim = options.dim(), heads = options.heads(), kv_heads = options.kv_heads().value_or(heads);
    require(heads > 0 && dim > 0 && (options.head_dim().has_value() || dim % heads == 0), "headroom.nn.attention.heads",
            heads, " heads do not divide the width ", dim,
            "; choose a width that is a multiple of heads, or a head_dim");
    require(kv_heads > 0 && heads % kv_heads == 0, "headroom.nn.attention.heads", kv_heads,
            " heads of k and v do not divide the ", heads, " of q; choose a divisor");
    require(head_dim() > 0 && (!options.rotary() || head_dim() % 2 == 0), "headroom.nn.rotary.dim",
            "rotary embedding rotates pairs of features, the head dim is ", head_dim(), "; choose an even head dim");
    const auto projection = [&](const char* name, int64_t in, int64_t out) {
      return register_module(name, Linear(torch::nn::LinearOptions(in, out).bias(options.bias())));
    };
    to_qkv = projection("to_qkv", dim, (heads + 2 * kv_heads) * head_dim());
    to_out = projection("to_out", heads * head_dim(), dim);
    if (options.sink()) sink = register_parameter("sink", torch::zeros({heads}));
    if (const int64_t reach = options.relative_bias(); reach > 0) {
      relative_bias = register_parameter("relative_bias", torch::zeros({heads, 2 * reach - 1}));
    }
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::SelfAttention(" << options.dim() << ", heads=" << options.heads();
    if (options.kv_heads().has_value()) stream << ", kv_heads=" << *options.kv_heads();
    if (options.head_dim().has_value()) stream << ", head_dim=" << *options.head_dim();
    stream << std::boolalpha << ", rotary=" << options.rotary() << ")";
  }

  /// x [..., dim] with at least one token dimension -> same shape; attends along dimension `axis`. `request` takes the
  /// place of the options' for this call: what belongs to a batch, such as key_lengths. To q [..., heads, L, head_dim]
  /// belong, as batch dimensions, those of x but the axis and the last.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2,
                        const std::optional<AttentionOptions>& request = {}) {
    return detail::run({.x = attended({.x = x}, axis, request),
                        .weights = {to_out->weight},
                        .biases = detail::bias_list(to_out->bias)});
  }

  /// x + forward(norm(x), axis, request); neither norm(x) nor the sum's terms are stored.
  torch::Tensor forward_residual(const torch::Tensor& x, const RMSNorm& norm, int64_t axis = -2,
                                 const std::optional<AttentionOptions>& request = {}) {
    const torch::Tensor heads =
        attended({.x = x, .norm_weight = norm->weight, .eps = norm->options.eps()}, axis, request);
    return detail::run(
        {.x = heads, .residual = x, .weights = {to_out->weight}, .biases = detail::bias_list(to_out->bias)});
  }

  /// What a call asks: `given`, or what the options say; no dropout unless training.
  AttentionOptions request_of(const std::optional<AttentionOptions>& given) const {
    AttentionOptions request = given.value_or(options.request());
    if (!is_training()) request.dropout(0);
    return request;
  }

  SelfAttentionOptions options;
  Linear to_qkv{nullptr}, to_out{nullptr};
  torch::Tensor sink;           // [heads], undefined without
  torch::Tensor relative_bias;  // [heads,2R-1], undefined without

 private:
  int64_t head_dim() const { return options.head_dim().value_or(options.dim() / options.heads()); }

  /// What the heads give, side by side: [..., heads·head_dim]. The projection to q, k and v is appended to `chain`.
  torch::Tensor attended(detail::TokenChain chain, int64_t axis, const std::optional<AttentionOptions>& given) {
    const torch::Tensor& x = chain.x;
    const int64_t sequence = detail::token_axis(x, axis, options.dim(), "headroom.nn.attention.shape");
    AttentionOptions request = with_parameters(request_of(given));
    const auto rotation = rotary_of(request, x.size(sequence), x.dim() - 1 - sequence, x.device());
    chain.weights = {to_qkv->weight};
    chain.biases = detail::bias_list(to_qkv->bias);
    const torch::Tensor packed = detail::run(chain).unflatten(-1, {-1, head_dim()});  // [...,H+2Hk,D]
    return headroom::detail::packed_attention(packed, options.heads(), rotation, sequence, request).flatten(-2);
  }

  AttentionOptions with_parameters(AttentionOptions request) const {
    const auto check = [](bool both, const char* name) {
      require(!both, "headroom.nn.attention.request", "the layer has its own ", name,
              " and the request another; leave one of them out");
    };
    check(options.rotary() && (request.rotary().has_value() || request.polar().has_value()), "rotary");
    check(sink.defined() && request.sink().has_value(), "sink");
    check(relative_bias.defined() && request.relative_bias().has_value(), "relative_bias");
    if (sink.defined()) request.sink(sink);
    if (relative_bias.defined()) request.relative_bias(relative_bias);
    return request;
  }

  /// Where a query's position is its place, the rotation of the projections: a table [L, 1 …, D/2] that broadcasts over
  /// the `behind` dimensions between the sequence and the features. Else attention is asked to rotate by position.
  std::optional<torch::Tensor> rotary_of(AttentionOptions& request, int64_t length, int64_t behind,
                                         torch::Device device) {
    if (!options.rotary()) return std::nullopt;
    const int64_t offset = request.query_offset();
    if (offset != 0 || request.sequence_starts().has_value()) {
      request.rotary(table(length + std::abs(offset), device));
      return std::nullopt;
    }
    std::vector<int64_t> shape(behind + 2, 1);  // other token dimensions, head, pair
    shape.front() = length;
    shape.back() = head_dim() / 2;
    return table(length, device).view(shape);
  }
  /// Kept from call to call, not part of the state.
  const torch::Tensor& table(int64_t length, torch::Device device) {
    if (!table_.defined() || table_.size(0) != length || table_.device() != device) {
      table_ = rotary_table(length, head_dim(), options.rotary_theta(), device);
    }
    return table_;
  }

  torch::Tensor table_;  // complex [L, D/2]
};
TORCH_MODULE(SelfAttention);

}  // namespace headroom::inline v0::nn
