#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/options/activation.h>

#include <limits>
#include <tuple>

#include "headroom/attention.hpp"
#include "headroom/nn/linear.hpp"

namespace headroom::inline v0::nn {

using torch::nn::MultiheadAttentionOptions;

/// torch::nn::MultiheadAttention (its options, parameters, initialisation and call) on headroom's attention: no tensor
/// of Lq x Lk scores, and projections that are attended where they lie. What differs:
///   - need_weights is false unless asked for, since weights are Lq x Lk;
///   - a bool attn_mask is true where a key is hidden, as key_padding_mask is; LibTorch's C++ module adds it to scores;
///   - attn_mask may be [N·H, Lq, Lk], and features of key and value may differ;
///   - a query that sees no key gets the bias of out_proj, where LibTorch gives NaN;
///   - the weights are those before dropout.
class MultiheadAttentionImpl : public torch::nn::Cloneable<MultiheadAttentionImpl> {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(MultiheadAttentionOptions(embed_dim, num_heads)) {}
  explicit MultiheadAttentionImpl(const MultiheadAttentionOptions& options) : options(options) { reset(); }

  void reset() override {
    const int64_t dim = options.embed_dim(), heads = options.num_heads();
    require(heads > 0 && dim > 0 && dim % heads == 0, "headroom.nn.attention.heads", heads,
            " heads do not divide the width ", dim, "; choose a width that is a multiple of heads");
    const auto parameter = [&](const char* name, bool exists, const std::vector<int64_t>& sizes) {
      return register_parameter(name, exists ? torch::empty(sizes) : torch::Tensor(), exists);
    };
    const bool packed = options.kdim() == dim && options.vdim() == dim;
    q_proj_weight = parameter("q_proj_weight", !packed, {dim, dim});
    k_proj_weight = parameter("k_proj_weight", !packed, {dim, options.kdim()});
    v_proj_weight = parameter("v_proj_weight", !packed, {dim, options.vdim()});
    in_proj_weight = parameter("in_proj_weight", packed, {3 * dim, dim});
    in_proj_bias = parameter("in_proj_bias", options.bias(), {3 * dim});
    out_proj = register_module("out_proj", Linear(torch::nn::LinearOptions(dim, dim).bias(options.bias())));
    bias_k = parameter("bias_k", options.add_bias_kv(), {1, 1, dim});
    bias_v = parameter("bias_v", options.add_bias_kv(), {1, 1, dim});
    // In LibTorch's order, so that a seed gives the same parameters
    using namespace torch::nn::init;
    for (const torch::Tensor& weight : {in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight}) {
      if (weight.defined()) xavier_uniform_(weight);
    }
    for (const torch::Tensor& bias : {in_proj_bias, out_proj->bias}) {
      if (bias.defined()) constant_(bias, 0);
    }
    for (const torch::Tensor& bias : {bias_k, bias_v}) {
      if (bias.defined()) xavier_normal_(bias);
    }
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::nn::MultiheadAttention(" << options.embed_dim() << ", num_heads=" << options.num_heads()
           << ", dropout=" << options.dropout() << ")";
  }

  /// query [Lq,N,E], key [Lk,N,kdim], value [Lk,N,vdim] -> output [Lq,N,E] and, if needed, weights [N,Lq,Lk], the mean
  /// over the heads, or [N,H,Lq,Lk] without average_attn_weights; add_bias_kv and add_zero_attn append a key each.
  /// key_padding_mask bool [N,Lk], true where a key is hidden; attn_mask [Lq,Lk] or [N·H,Lq,Lk], bool alike, or of
  /// query's dtype and added to the scores. Differentiable in all of them, and in both results.
  ///
  /// One tensor as query, key and value is projected once, and q, k and v are views of that. Tokens that are views of
  /// batch-first ones (x.transpose(0, 1)) are not copied either, and the output lies likewise. Throws
  /// headroom.nn.multihead_attention.*.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& query, const torch::Tensor& key,
                                                   const torch::Tensor& value,
                                                   const torch::Tensor& key_padding_mask = {},
                                                   bool need_weights = false, const torch::Tensor& attn_mask = {},
                                                   bool average_attn_weights = true) {
    check(query, key, value, key_padding_mask, attn_mask);
    const Heads heads = project(query, key, value);
    auto request = visibility(query, key_padding_mask, attn_mask);
    request.dropout(is_training() ? options.dropout() : 0.0).backend(backend);
    if (options.add_zero_attn()) request.sink(torch::zeros({options.num_heads()}, query.options()));
    torch::Tensor attended;  // [Lq,N,H,D]
    if (bias_k.defined()) {
      const auto others = headroom::detail::run_backend(heads.q, heads.k, heads.v, request, /*with_lse=*/true);
      attended = with_bias_key(heads.q, others.output, others.lse).movedim(-2, 0);
    } else if (heads.packed.defined()) {
      attended = headroom::detail::packed_attention(heads.packed.flatten(-3, -2), options.num_heads(), std::nullopt, 0,
                                                    request);
    } else {
      attended = attention(heads.q, heads.k, heads.v, request).movedim(-2, 0);
    }
    const torch::Tensor output = linear_where_it_lies(attended.flatten(-2), out_proj->weight, out_proj->bias);
    if (!need_weights) return {output, torch::Tensor()};
    return {output, weights(heads, query, key_padding_mask, attn_mask, average_attn_weights)};
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(torch::Tensor())}, {4, torch::nn::AnyValue(false)},
                           {5, torch::nn::AnyValue(torch::Tensor())}, {6, torch::nn::AnyValue(true)})

 public:
  MultiheadAttentionOptions options;
  AttentionBackend backend = AttentionBackend::automatic;     // who computes attention
  torch::Tensor in_proj_weight, in_proj_bias;                 // [3E,E] or undefined, [3E] or undefined
  torch::Tensor q_proj_weight, k_proj_weight, v_proj_weight;  // [E,E], [E,kdim], [E,vdim] instead of in_proj_weight
  torch::Tensor bias_k, bias_v;                               // [1,1,E] or undefined
  Linear out_proj{nullptr};

 private:
  /// Projections as [N,H,L,D]; `packed` [L,N,3,H,D] is what they are views of in self-attention, else undefined.
  struct Heads {
    torch::Tensor packed, q, k, v;
  };

  void check(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value,
             const torch::Tensor& key_padding_mask, const torch::Tensor& attn_mask) const {
    const auto sizes = [](const torch::Tensor& x) { return x.defined() ? x.sizes() : at::IntArrayRef(); };
    const auto are_tokens = [](const torch::Tensor& x, int64_t dim) {
      return x.defined() && x.dim() == 3 && x.size(2) == dim;
    };
    require(are_tokens(query, options.embed_dim()) && are_tokens(key, options.kdim()) &&
                are_tokens(value, options.vdim()) && key.size(1) == query.size(1) &&
                key.sizes().slice(0, 2) == value.sizes().slice(0, 2),
            "headroom.nn.multihead_attention.shape", "query ", sizes(query), ", key ", sizes(key), ", value ",
            sizes(value), "; expected query [Lq,N,", options.embed_dim(), "], key [Lk,N,", options.kdim(),
            "], value [Lk,N,", options.vdim(), "]; batch-first tokens are given as x.transpose(0, 1)");
    const int64_t batch = query.size(1), queries = query.size(0), keys = key.size(0);
    const auto described = [](const torch::Tensor& x) {
      std::ostringstream text;
      text << x.dtype() << " " << x.sizes() << " on " << x.device();
      return text.str();
    };
    if (const auto& mask = key_padding_mask; mask.defined()) {
      require(mask.scalar_type() == torch::kBool && mask.device() == query.device() &&
                  mask.sizes() == at::IntArrayRef({batch, keys}),
              "headroom.nn.multihead_attention.mask", "key_padding_mask is ", described(mask), "; expected bool [",
              batch, ", ", keys, "] on ", query.device(), ", true where a key is hidden");
    }
    if (const auto& mask = attn_mask; mask.defined()) {
      require((mask.scalar_type() == torch::kBool || mask.scalar_type() == query.scalar_type()) &&
                  mask.device() == query.device() &&
                  (mask.sizes() == at::IntArrayRef({queries, keys}) ||
                   mask.sizes() == at::IntArrayRef({batch * options.num_heads(), queries, keys})),
              "headroom.nn.multihead_attention.mask", "attn_mask is ", described(mask), "; expected [", queries, ", ",
              keys, "] or [", batch * options.num_heads(), ", ", queries, ", ", keys, "] on ", query.device(),
              ": bool, true where a key is hidden, or ", query.dtype(), ", which is added to the scores");
    }
  }

  /// x [L,N,in] -> [L,N,out] in memory as x is, where x is dense or a view of dense [N,L,in].
  static torch::Tensor linear_where_it_lies(const torch::Tensor& x, const torch::Tensor& weight,
                                            const torch::Tensor& bias) {
    const auto given = bias.defined() ? std::optional(bias) : std::nullopt;
    const bool batch_first = !x.is_contiguous() && x.transpose(0, 1).is_contiguous();
    return batch_first ? nn::linear(x.transpose(0, 1), weight, given).transpose(0, 1) : nn::linear(x, weight, given);
  }

  /// Projects x [L,N,in] by the rows [first, first + count)·E of in_proj_weight, or by `weight` if that is defined:
  /// [L,N,count,H,D].
  torch::Tensor projected(const torch::Tensor& x, int64_t first, int64_t count, const torch::Tensor& weight) const {
    const int64_t dim = options.embed_dim();
    const auto rows = [&](const torch::Tensor& all) {
      return all.defined() && count < 3 ? all.narrow(0, first * dim, count * dim) : all;
    };
    return linear_where_it_lies(x, weight.defined() ? weight : rows(in_proj_weight), rows(in_proj_bias))
        .unflatten(-1, {count, options.num_heads(), dim / options.num_heads()});
  }

  Heads project(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) const {
    // unbind: its gradient is one stacked tensor, where that of three views would be three padded ones and their sum
    const auto part = [](const std::vector<torch::Tensor>& parts, size_t i) { return parts[i].movedim(0, -2); };
    if (in_proj_weight.defined() && query.is_same(key) && key.is_same(value)) {
      const torch::Tensor packed = projected(query, 0, 3, {});
      const auto parts = packed.unbind(-3);
      return {packed, part(parts, 0), part(parts, 1), part(parts, 2)};
    }
    const torch::Tensor q = part(projected(query, 0, 1, q_proj_weight).unbind(-3), 0);
    if (in_proj_weight.defined() && key.is_same(value)) {
      const auto parts = projected(key, 1, 2, {}).unbind(-3);
      return {{}, q, part(parts, 0), part(parts, 1)};
    }
    return {{},
            q,
            part(projected(key, 1, 1, k_proj_weight).unbind(-3), 0),
            part(projected(value, 2, 1, v_proj_weight).unbind(-3), 0)};
  }

  /// The masks as options of attention, broadcast and not copied: padding at the end as key lengths, which skip keys;
  /// other padding as hidden keys; where attn_mask already is those, as -inf that is added.
  AttentionOptions visibility(const torch::Tensor& query, const torch::Tensor& key_padding_mask,
                              const torch::Tensor& attn_mask) const {
    AttentionOptions request;
    if (attn_mask.defined()) {
      const torch::Tensor scores =
          attn_mask.dim() == 3 ? attn_mask.unflatten(0, {query.size(1), options.num_heads()}) : attn_mask;
      attn_mask.scalar_type() == torch::kBool ? request.hidden(scores) : request.bias(scores);
    }
    if (!key_padding_mask.defined()) return request;
    if (key_padding_mask.device().is_cpu()) {
      const torch::Tensor lengths = key_padding_mask.logical_not().sum(-1);  // [N]
      const torch::Tensor behind = torch::arange(key_padding_mask.size(1)) >= lengths.unsqueeze(-1);
      if (torch::equal(behind, key_padding_mask)) return request.key_lengths(lengths);
    }
    const torch::Tensor padding = key_padding_mask.unsqueeze(1).unsqueeze(1);  // [N,1,1,Lk]
    if (!request.hidden().has_value()) return request.hidden(padding);
    return request.bias(
        torch::zeros(padding.sizes(), query.options()).masked_fill_(padding, -std::numeric_limits<double>::infinity()));
  }

  /// Attention with bias_k and bias_v as one more key and value: its share of the weights is
  /// exp(score) / (exp(score) + exp(lse)), so that neither k, v nor the masks are copied to append it. `output` and
  /// `lse`, in double, are those of the other keys.
  torch::Tensor with_bias_key(const torch::Tensor& q, const torch::Tensor& output, const torch::Tensor& lse) const {
    const auto split = [&](const torch::Tensor& x) { return x.view({options.num_heads(), 1, -1}); };  // [H,1,D]
    const torch::Tensor scores = torch::einsum("nhld,hod->nhlo", {q, split(bias_k)}) / std::sqrt(q.size(-1));
    const torch::Tensor lead = scores - lse.unsqueeze(-1);  // [N,H,Lq,1]
    const torch::Tensor share = torch::dropout(lead.sigmoid(), options.dropout(), is_training());
    const auto type = q.scalar_type();
    return output * lead.neg().sigmoid().to(type) + share.to(type) * split(bias_v);
  }

  /// Weights before dropout, the appended keys' last.
  torch::Tensor weights(const Heads& heads, const torch::Tensor& query, torch::Tensor key_padding_mask,
                        torch::Tensor attn_mask, bool average) const {
    std::vector<torch::Tensor> keys{heads.k};
    std::vector<int64_t> sizes = heads.k.sizes().vec();
    sizes[2] = 1;
    if (bias_k.defined()) {  // under autocast, projections are narrower than parameters
      keys.push_back(bias_k.to(heads.k.scalar_type()).view({1, options.num_heads(), 1, -1}).expand(sizes));
    }
    if (options.add_zero_attn()) keys.push_back(torch::zeros(sizes, heads.k.options()));
    if (const auto appended = static_cast<int64_t>(keys.size()) - 1; appended > 0) {
      for (torch::Tensor* mask : {&key_padding_mask, &attn_mask}) {
        if (mask->defined()) *mask = torch::constant_pad_nd(*mask, {0, appended});
      }
    }
    return attention_weights(heads.q, keys.size() == 1 ? heads.k : torch::cat(keys, 2),
                             visibility(query, key_padding_mask, attn_mask), average);
  }
};
TORCH_MODULE(MultiheadAttention);

}  // namespace headroom::inline v0::nn
