#pragma once

#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "headroom/attention/chunked.hpp"

namespace headroom::inline v0::detail {

/// True if the kernels read the request's bias where it lies: in q's dtype, and on CUDA dense and aligned along keys.
inline bool takes_bias(const torch::Tensor& q, const AttentionRequest& request) {
  const torch::Tensor& bias = request.bias;
  if (bias.scalar_type() != q.scalar_type()) return false;
  if (compute_device(q).is_cpu()) return true;
  const bool dense = bias.dim() > 0 && bias.size(-1) == request.keys() && bias.stride(-1) == 1;
  return dense && request.keys() % 16 == 0 && bias.storage_offset() % 16 == 0;
}

/// Attention by the fused kernels behind LibTorch's scaled_dot_product_attention, called so that they return the
/// log-sum-exp and never fall back to stored scores. Several calls where batch x heads exceed `limit`, CUDA's for a
/// dimension of a grid; features padded with zeros where a kernel wants other head dims.
class FusedAttention {
 public:
  explicit FusedAttention(const AttentionInputs& in, int64_t limit = 65535)
      : q_(in.q), k_(in.k), v_(in.v), request_(in.request), limit_(limit), bias_(unexpanded(in.request.bias)) {}

  AttentionForward forward() const {
    std::vector<int64_t> shape = q_.sizes().vec();
    shape.back() = v_.size(-1);
    Result output(q_, shape, /*in_order=*/true);
    AttentionForward result{{}, torch::empty(all_but_last(shape, 1), q_.options().dtype(torch::kDouble))};
    for_each_call([&](const HeadRange& heads) {
      const int64_t width = padded_width(std::max(q_.size(-1), v_.size(-1)));
      const Call call{padded(part_of(q_, heads, 2), width), padded(part_of(k_, heads, 2), width),
                      padded(part_of(v_, heads, 2), width), bias_of(heads)};
      auto [part, lse, rest] = run(call);
      output.store(heads, part);
      torch::Tensor seen = lse.flatten(2).slice(2, 0, request_.queries());
      if (bias_.defined()) seen = seen.masked_fill(rows_without_keys(bias_of(heads)), -INFINITY);
      part_of(result.lse, heads, 1).copy_(seen);
      result.extra.push_back(lse);
      result.extra.insert(result.extra.end(), rest.begin(), rest.end());
    });
    result.output = output.whole();
    return result;
  }

  AttentionGradients backward(const AttentionForward& forward, const ResultGradients& grad) const {
    Result grad_q(q_, q_.sizes(), false), grad_k(k_, k_.sizes(), false), grad_v(v_, v_.sizes(), false);
    int64_t calls = 0;
    for_each_call([&](const HeadRange&) { ++calls; });
    const size_t saved = calls == 0 ? 0 : forward.extra.size() / calls;
    at::TensorList extra(forward.extra);
    for_each_call([&](const HeadRange& heads) {
      // A kernel computes P·(dO·Vᵀ - rowsum(dO·O)). A feature that is 1 in V, 0 in O and grad_lse in dO adds
      // P·grad_lse.
      const bool with_lse = grad.lse.defined();
      const int64_t features = std::max(q_.size(-1), v_.size(-1));
      const int64_t width = padded_width(features + with_lse);
      const auto pad = [&](const torch::Tensor& x) { return padded(part_of(x, heads, 2), width); };
      const Call call{pad(q_), pad(k_), pad(v_), bias_of(heads)};
      torch::Tensor d_output = pad(grad.output);
      if (with_lse) {
        const torch::Tensor d_lse = part_of(grad.lse, heads, 1);
        d_output.select(-1, width - 1).copy_(d_lse.masked_fill(part_of(forward.lse, heads, 1) == -INFINITY, 0));
        call.v.select(-1, width - 1).fill_(1);
      }
      const auto [dq, dk, dv] = run_backward(call, d_output, pad(forward.output), extra.slice(0, saved));
      grad_q.store(heads, dq), grad_k.store(heads, dk), grad_v.store(heads, dv);
      extra = extra.slice(saved);
    });
    return {grad_q.whole(), grad_k.whole(), grad_v.whole()};
  }

 private:
  struct Call {
    torch::Tensor q, k, v;  // [b,h,L,width]
    torch::Tensor bias;     // [b or 1,h or 1,Lq or 1,Lk or 1], or undefined
  };
  struct Returned {
    torch::Tensor output, lse;
    std::vector<torch::Tensor> rest;  // what the backward kernel wants beside them
  };

  template <class F>
  void for_each_call(F&& f) const {
    const int64_t most = std::clamp<int64_t>(limit_, 1, request_.heads());
    for_each_head_range(request_, std::max<int64_t>(limit_ / request_.heads(), 1), most,
                        [&](const HeadRange& heads, const HeadRange&) { f(heads); });
  }

  /// A result that kernels compute call by call. What a kernel gives in the only call is the result itself: the
  /// output where it lies in the order of q, a gradient however it lies.
  class Result {
   public:
    Result(const torch::Tensor& like, at::IntArrayRef shape, bool in_order)
        : like_(like), shape_(shape.vec()), in_order_(in_order) {}

    void store(const HeadRange& heads, const torch::Tensor& part) {
      if (!whole_.defined() && part.sizes() == shape_ && (!in_order_ || lies_in_order_of(like_, part))) {
        whole_ = part;
      } else {
        part_of(whole(), heads, 2).copy_(part.narrow(-1, 0, shape_.back()));
      }
    }
    const torch::Tensor& whole() {
      if (!whole_.defined()) whole_ = empty_in_order_of(like_, shape_, like_.options());
      return whole_;
    }

   private:
    const torch::Tensor& like_;
    std::vector<int64_t> shape_;
    bool in_order_;
    torch::Tensor whole_;
  };

  torch::Tensor bias_of(const HeadRange& heads) const { return part_of(bias_, heads, 2); }
  std::optional<torch::Tensor> expanded_bias(const Call& call) const {
    if (!call.bias.defined()) return std::nullopt;
    return call.bias.expand({call.q.size(0), call.q.size(1), request_.queries(), request_.keys()});
  }

  /// Rows [b or 1, h or 1, Lq or 1] of a bias that hides all keys their queries see. Kernels differ in the log-sum-exp
  /// that they return for them.
  torch::Tensor rows_without_keys(const torch::Tensor& bias) const {
    const torch::Tensor allowed = bias != -std::numeric_limits<double>::infinity();
    const torch::Tensor none = allowed.any(-1).logical_not();
    if (!request_.causal) return none;
    const torch::Tensor first = allowed.to(torch::kByte).argmax(-1);
    return none.logical_or(first > torch::arange(request_.queries(), first.options()));
  }

  int64_t padded_width(int64_t features) const {
    return compute_device(q_).is_cuda() ? (features + 7) / 8 * 8 : features;
  }
  static torch::Tensor padded(torch::Tensor x, int64_t width) {
    if (x.size(-1) < width) x = at::constant_pad_nd(x, {0, width - x.size(-1)});  // which may keep channels last
    // Rows next to each other, none over another; contiguous() would keep any stride of a dimension of one element
    return x.stride(-1) == 1 && x.stride(-2) >= x.size(-1) ? x : x.clone(at::MemoryFormat::Contiguous);
  }

  /// Kernels for CUDA, by how many tensors their backward pass is given beside inputs and output.
  enum Kernel : size_t { efficient = 3, cudnn = 4, flash = 5 };

  /// The one that LibTorch's function would take, too.
  Kernel choose(const Call& call) const {
    if (call.bias.defined() || q_.scalar_type() == torch::kFloat || call.q.size(-1) > 256) return efficient;
    if (request_.causal && request_.queries() != request_.keys()) return efficient;  // aligned bottom right by others
    constexpr int64_t kFlash = 1, kCudnn = 3;                                        // at::SDPBackend
    const int64_t choice =
        at::_fused_sdp_choice(call.q, call.k, call.v, std::nullopt, 0.0, request_.causal, request_.scale);
    return choice == kCudnn ? cudnn : choice == kFlash ? flash : efficient;
  }

  Returned run(const Call& call) const {
    if (compute_device(q_).is_cpu()) {
      const auto bias = call.bias.defined() ? std::optional(call.bias) : std::nullopt;
      auto [output, lse] = at::_scaled_dot_product_flash_attention_for_cpu(call.q, call.k, call.v, 0.0, request_.causal,
                                                                           bias, request_.scale);
      return {output, lse, {}};
    }
    const Kernel kernel = choose(call);
    if (kernel == flash) {
      auto [output, lse, starts_q, starts_k, max_q, max_k, seed, offset, debug] =
          at::_scaled_dot_product_flash_attention(call.q, call.k, call.v, 0.0, request_.causal,
                                                  /*return_debug_mask=*/false, request_.scale);
      return {output, lse, {starts_q, starts_k, seed, offset}};
    }
    if (kernel == cudnn) {
      auto [output, lse, starts_q, starts_k, max_q, max_k, seed, offset, debug] =
          at::_scaled_dot_product_cudnn_attention(call.q, call.k, call.v, std::nullopt, /*compute_log_sumexp=*/true,
                                                  0.0, request_.causal, /*return_debug_mask=*/false, request_.scale);
      return {output, lse, {seed, offset, at::empty({0}, lse.options())}};
    }
    auto [output, lse, seed, offset] = at::_scaled_dot_product_efficient_attention(
        call.q, call.k, call.v, expanded_bias(call), /*compute_log_sumexp=*/true, 0.0, request_.causal, request_.scale);
    return {output, lse, {seed, offset}};
  }

  std::array<torch::Tensor, 3> run_backward(const Call& call, const torch::Tensor& grad_output,
                                            const torch::Tensor& output, at::TensorList saved) const {
    const torch::Tensor& lse = saved[0];
    if (compute_device(q_).is_cpu()) {
      const auto bias = call.bias.defined() ? std::optional(call.bias) : std::nullopt;
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          grad_output, call.q, call.k, call.v, output, lse, 0.0, request_.causal, bias, request_.scale);
      return {dq, dk, dv};
    }
    if (saved.size() == cudnn) {
      const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
          grad_output, call.q, call.k, call.v, output, lse, saved[1], saved[2], {}, {}, {}, request_.queries(),
          request_.keys(), 0.0, request_.causal, request_.scale);
      return {dq, dk, dv};
    }
    if (saved.size() == flash) {
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
          grad_output, call.q, call.k, call.v, output, lse, saved[1], saved[2], request_.queries(), request_.keys(),
          0.0, request_.causal, saved[3], saved[4], request_.scale);
      return {dq, dk, dv};
    }
    // In 16 bits the kernel reads the output without asking for its strides: as it made it, [b,L,h,D] in memory
    const torch::Tensor made = output.transpose(1, 2).contiguous().transpose(1, 2);
    const auto [dq, dk, dv, d_bias] = at::_scaled_dot_product_efficient_attention_backward(
        grad_output, call.q, call.k, call.v, expanded_bias(call).value_or(torch::Tensor()), made, lse, saved[1],
        saved[2], 0.0, {true, true, true, false}, request_.causal, request_.scale);
    return {dq, dk, dv};
  }

  const torch::Tensor &q_, &k_, &v_;
  const AttentionRequest& request_;
  int64_t limit_;
  torch::Tensor bias_;
};

/// The chunked backend takes over where fused kernels would be wrong. They multiply hidden keys by zero, which keeps a
/// NaN: where keys are hidden and something is not finite. Their backward pass takes the log-sum-exp as one number:
/// where that is coarse. On CUDA only a bias is thought to make it so, and without one the program doesn't wait for the
/// answer.
struct FusedBackend {
  static constexpr bool kDifferentiableLse = true;

  static AttentionForward forward(const AttentionInputs& in) {
    const bool leaks = in.request.causal && (rows_not_finite(in.q).defined() || rows_not_finite(in.k).defined() ||
                                             rows_not_finite(in.v).defined() || holds_nan_or_infinity(in.request.bias));
    if (leaks) return ChunkedBackend::forward(in);
    if (in.request.polar.defined()) return FusedAttention(PolarInputs(in).inputs()).forward();
    return FusedAttention(in).forward();
  }
  static AttentionGradients backward(const AttentionInputs& in, const AttentionForward& forward,
                                     const ResultGradients& grad, const WantedGradients& wanted) {
    const bool was_chunked = forward.extra.empty();
    const bool leaks = in.request.causal && rows_not_finite(grad.output).defined();  // forward asked for the others
    const bool may_be_coarse = in.request.bias.defined() || compute_device(in.q).is_cpu();
    if (was_chunked || leaks || (may_be_coarse && is_coarse_lse(forward.lse))) {
      return ChunkedBackend::backward(in, forward, grad, wanted);
    }
    if (!in.request.polar.defined()) return FusedAttention(in).backward(forward, grad);
    const PolarInputs polar(in);
    return polar.back(FusedAttention(polar.inputs()).backward(forward, grad), wanted);
  }

 private:
  /// True for NaN and infinity; -infinity hides, and stays apart. False for no bias.
  static bool holds_nan_or_infinity(const torch::Tensor& bias) {
    if (!bias.defined() || bias.is_meta() || bias.numel() == 0) return false;
    return !(bias.max().item<double>() < std::numeric_limits<double>::infinity());
  }
};

}  // namespace headroom::inline v0::detail
