#pragma once

#include <concepts>
#include <optional>

#include "headroom/nn/feed_forward.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/nn/self_attention.hpp"

namespace headroom::inline v0::nn {

/// A module holder over tokens whose forward attends along an axis: forward(x [..., dim], axis) -> same shape.
template <class M>
concept TokenMixer = requires(M m, torch::Tensor x, int64_t axis) {
  { m->forward(x, axis) } -> std::convertible_to<torch::Tensor>;
};
/// One that can also be asked for more in a call: forward(x, axis, request).
template <class M>
concept TakesRequest = TokenMixer<M> && requires(M m, torch::Tensor x, std::optional<AttentionOptions> request) {
  { m->forward(x, -2, request) } -> std::convertible_to<torch::Tensor>;
  { m->request_of(request) } -> std::convertible_to<AttentionOptions>;
};
/// A module holder that treats every token alone: forward(x [..., dim]) -> same shape.
template <class M>
concept TokenWise = requires(M m, torch::Tensor x) {
  { m->forward(x) } -> std::convertible_to<torch::Tensor>;
};

/// Pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x)). Composed of any two modules of the right
/// shape; EncoderBlock below is the usual one. A module that also has forward_residual(x, norm, …) computes norm and
/// sum itself.
template <TokenMixer Attention, TokenWise FeedForward>
class BasicEncoderBlockImpl : public torch::nn::Module {
 public:
  BasicEncoderBlockImpl(int64_t dim, Attention attention, FeedForward feed_forward)
      : attention_norm(register_module("attention_norm", RMSNorm(dim))),
        attention(register_module("attention", std::move(attention))),
        feed_forward_norm(register_module("feed_forward_norm", RMSNorm(dim))),
        feed_forward(register_module("feed_forward", std::move(feed_forward))) {}

  /// x [..., dim] -> same shape, attending along dimension `axis`. `request` is for the attention, as
  /// SelfAttention::forward takes it. Throws headroom.nn.encoder.request.
  torch::Tensor forward(const torch::Tensor& x, int64_t axis = -2,
                        const std::optional<AttentionOptions>& request = {}) {
    return feed(attend(x, axis, request));
  }

  /// The first half, which mixes tokens along dimension `axis`: x + attention(norm(x)).
  torch::Tensor attend(const torch::Tensor& x, int64_t axis = -2, const std::optional<AttentionOptions>& request = {}) {
    if constexpr (TakesRequest<Attention>) {
      return attend_with(x, axis, request);
    } else {
      require(!request.has_value(), "headroom.nn.encoder.request",
              "the block's attention takes no request; use SelfAttention, or leave the request out");
      return attend_with(x, axis);
    }
  }

  /// The second half, which treats every token alone: x + feed_forward(norm(x)).
  torch::Tensor feed(const torch::Tensor& x) {
    if constexpr (requires { feed_forward->forward_residual(x, feed_forward_norm); }) {
      return feed_forward->forward_residual(x, feed_forward_norm);
    } else {
      return x + feed_forward->forward(feed_forward_norm->forward(x));
    }
  }

  RMSNorm attention_norm;
  Attention attention;
  RMSNorm feed_forward_norm;
  FeedForward feed_forward;

 private:
  torch::Tensor attend_with(const torch::Tensor& x, const auto&... axis_and_request) {
    if constexpr (requires { attention->forward_residual(x, attention_norm, axis_and_request...); }) {
      return attention->forward_residual(x, attention_norm, axis_and_request...);
    } else {
      return x + attention->forward(attention_norm->forward(x), axis_and_request...);
    }
  }
};

/// Holder of a BasicEncoderBlockImpl, usable wherever LibTorch takes a module holder.
template <TokenMixer Attention, TokenWise FeedForward>
class BasicEncoderBlock : public torch::nn::ModuleHolder<BasicEncoderBlockImpl<Attention, FeedForward>> {
 public:
  using torch::nn::ModuleHolder<BasicEncoderBlockImpl<Attention, FeedForward>>::ModuleHolder;
};

using EncoderBlock = BasicEncoderBlock<SelfAttention, FeedForward>;

}  // namespace headroom::inline v0::nn
