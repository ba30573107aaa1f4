#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/nn/encoder_block.hpp"
#include "headroom/nn/request_axes.hpp"

// How encoder blocks run one after the other, under checkpoint policies.
namespace headroom::inline v0::nn {

/// Options of Encoder and AxialEncoder.
struct EncoderOptions {
  EncoderOptions(int64_t dim, int64_t heads, std::vector<int64_t> ffn_hidden, int64_t layers)
      : attention_(dim, heads), feed_forward_(dim, std::move(ffn_hidden)), layers_(layers) {}
  /// What the attention of each block is, and what its feed-forward network.
  TORCH_ARG(SelfAttentionOptions, attention);
  TORCH_ARG(FeedForwardOptions, feed_forward);
  /// Layers of the encoder.
  TORCH_ARG(int64_t, layers);
  /// What of the blocks is kept for the backward pass; true: the input of each block, the rest is computed again.
  TORCH_ARG(StackPolicy, gradient_checkpointing) = {};
  /// Two streams, y1 = x1 + attention(x2), y2 = x2 + feed_forward(y1), from which backward computes all activations
  /// back: another model than without, with the same parameters. Both streams start as the input, the output is their
  /// mean.
  TORCH_ARG(bool, reversible) = false;

 public:
  /// A new block.
  EncoderBlock block() const {
    return EncoderBlock(attention_.dim(), SelfAttention(attention_), FeedForward(feed_forward_));
  }
};

namespace detail {

/// The parameters of one half of a block.
inline std::vector<torch::Tensor> parameters_of(const RMSNorm& norm, const torch::nn::Module& branch) {
  std::vector<torch::Tensor> all = branch.parameters();
  all.push_back(norm->weight);
  return all;
}

/// The same of the attention half, with what the request has to learn.
inline std::vector<torch::Tensor> attention_parameters(const auto& block,
                                                       const std::optional<AttentionOptions>& request) {
  std::vector<torch::Tensor> all = parameters_of(block.attention_norm, *block.attention);
  if (!request.has_value()) return all;
  for (const torch::Tensor& x : headroom::detail::differentiable(*request)) all.push_back(x);
  return all;
}

}  // namespace detail

/// A block of a stack for run_stack(), over tokens of `dims` dimensions: attention along `axis`, with the others as
/// batch unless the `request` differs along them, and the feed-forward network, with all as batch.
template <TokenMixer Attention, TokenWise FeedForward>
StackBlock stack_block(const BasicEncoderBlock<Attention, FeedForward>& block, int64_t axis, int64_t dims,
                       std::optional<AttentionOptions> request = {}) {
  const auto& module = block.ptr();
  if constexpr (TakesRequest<Attention>) request = detail::repeatable(module->attention->request_of(request));
  std::vector<int64_t> independent, all;
  for (int64_t d = dims - 2, batch_dim = 0; d >= 0; --d) {
    all.insert(all.begin(), d);
    if (d == (axis < 0 ? axis + dims : axis)) continue;
    if (!request || detail::is_alike_along(*request, batch_dim)) independent.insert(independent.begin(), d);
    ++batch_dim;
  }
  return {{{[module, axis, request](const torch::Tensor& x) { return module->attend(x, axis, request); },
            detail::attention_parameters(*module, request), std::move(independent)},
           {[module](const torch::Tensor& x) { return module->feed(x); },
            detail::parameters_of(module->feed_forward_norm, *module->feed_forward), std::move(all)}}};
}

namespace detail {

/// A block, the dimension of the tokens that it attends along, and what is asked of its attention.
struct BlockAlong {
  EncoderBlock block;
  int64_t axis;
  std::optional<AttentionOptions> request = {};
};

inline ReversibleLayer reversible_layer(const BlockAlong& along) {
  const auto block = along.block.ptr();
  const AttentionOptions request = repeatable(block->attention->request_of(along.request));
  return {
      {[block, request, axis = along.axis](const torch::Tensor& x) {
         return block->attention->forward(block->attention_norm->forward(x), axis, request);
       },
       attention_parameters(*block, request)},
      {[block](const torch::Tensor& x) { return block->feed_forward->forward(block->feed_forward_norm->forward(x)); },
       parameters_of(block->feed_forward_norm, *block->feed_forward)}};
}

/// Blocks one after the other, as the options say. The only place where an encoder runs its blocks.
inline torch::Tensor run_encoder(const std::vector<BlockAlong>& blocks, const torch::Tensor& x,
                                 const EncoderOptions& options) {
  const StackPolicy& policy = options.gradient_checkpointing();
  if (options.reversible()) {
    require(policy == StackPolicy(), "headroom.nn.encoder.reversible",
            "reversible is true and the checkpoint policy \"", policy.text(),
            "\"; a reversible encoder stores nothing that a checkpoint could save, leave the policy out");
    std::vector<ReversibleLayer> layers;
    for (const BlockAlong& along : blocks) layers.push_back(reversible_layer(along));
    const auto [first, second] = run_reversible(layers, x, x);
    return (first + second) * 0.5;
  }
  std::vector<StackBlock> stack;
  for (const auto& [block, axis, request] : blocks) stack.push_back(stack_block(block, axis, x.dim(), request));
  return run_stack(stack, x, policy);
}

}  // namespace detail

}  // namespace headroom::inline v0::nn
