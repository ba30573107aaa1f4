#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/policy.hpp"
#include "headroom/checkpoint/tiled.hpp"

namespace headroom::inline v0 {

/// One of a stack of blocks that keep the shape of their tokens [..., features].
struct StackBlock {
  std::function<at::Tensor(const at::Tensor&)> forward;
  std::vector<at::Tensor> parameters;       ///< all that forward uses
  std::optional<int64_t> independent_axis;  ///< a dimension that forward treats as batch, for `tiled`
};

namespace detail {

/// What the layers of a block compute for all tokens of x, and what its parameters take, in bytes: enough to tell
/// whether there are so few tokens that gradients of weights decide.
struct BlockSize {
  double activations = 0, parameters = 0;

  BlockSize(const StackBlock& block, const at::Tensor& x) {
    if (x.numel() == 0) return;
    int64_t features = x.size(-1);  // of a token: its input, and a row for each row of a weight
    for (const at::Tensor& p : block.parameters) {
      if (p.dim() == 2) features += p.size(0);
      parameters += static_cast<double>(p.nbytes());
    }
    activations = static_cast<double>(x.nbytes()) / static_cast<double>(x.size(-1)) * static_cast<double>(features);
  }
};

/// How many slices a block is tiled into: so many that what its layers compute for one of them is about 32 MiB, which
/// keeps all threads busy, whatever the widths. 1 where slices would not pay: each adds gradients of all weights.
inline int64_t slices_of(const StackBlock& block, const at::Tensor& x) {
  constexpr double kSliceBytes = 32 << 20;
  if (!block.independent_axis || x.numel() == 0) return 1;
  const BlockSize size(block, x);
  const double slices =
      std::clamp(std::ceil(size.activations / kSliceBytes), 1.0, static_cast<double>(x.size(*block.independent_axis)));
  const bool pays = size.activations - size.activations / slices > 2 * size.parameters;
  return pays ? static_cast<int64_t>(slices) : 1;
}

/// Whether a block has so many tokens that keeping results of its operators is worth it: gradients of weights, which
/// grow while they are still kept, are smaller.
inline bool keeps_results(const StackBlock& block, const at::Tensor& x) {
  const BlockSize size(block, x);
  return size.activations > size.parameters;
}

/// Runs blocks[first, last) under `levels` levels of checkpoints.
inline at::Tensor run_blocks(const std::vector<StackBlock>& blocks, at::Tensor x, const CheckpointPolicy& policy,
                             int64_t levels) {
  using Block = CheckpointPolicy::Block;
  const auto count = static_cast<int64_t>(blocks.size());
  const auto group_size =
      levels == 1 ? policy.every
                  : static_cast<int64_t>(std::ceil(std::pow(count, static_cast<double>(levels - 1) / levels) - 1e-9));
  for (int64_t first = 0; first < count; first += group_size) {
    const std::vector<StackBlock> group(blocks.begin() + first, blocks.begin() + std::min(first + group_size, count));
    if (levels > 1) {
      const auto forward = [group, policy, levels](const at::Tensor& t) {
        return run_blocks(group, t, policy, levels - 1);
      };
      x = checkpoint(forward, x);
      continue;
    }
    const auto forward = [group](at::Tensor t) {
      for (const StackBlock& block : group) t = block.forward(t);
      return t;
    };
    if (policy.block == Block::none) {
      x = forward(x);
    } else if (policy.block == Block::selective && keeps_results(group.front(), x)) {
      x = selective_checkpoint(policy.keep, forward, x);
    } else if (const int64_t slices = policy.block == Block::tiled ? slices_of(group.front(), x) : 1; slices > 1) {
      x = tiled_checkpoint(group.front().forward, x, *group.front().independent_axis, slices, group.front().parameters);
    } else {
      x = checkpoint(forward, x);
    }
  }
  return x;
}

}  // namespace detail

/// Blocks one after the other, with what `policy` says kept for backward. Gradients are those without checkpoints: bit
/// for bit, up to rounding with `tiled`, as of rounded inputs with `bf16`. `tiled` is `full` for a block without an
/// independent axis, and `tiled` and `selective` are `full` for so few tokens that they would need more memory. Throws
/// headroom.checkpoint.policy, also for a policy that names more blocks than there are.
inline at::Tensor run_stack(const std::vector<StackBlock>& blocks, at::Tensor x, const StackPolicy& policy) {
  const auto count = static_cast<int64_t>(blocks.size());
  require(policy.named_blocks() <= count, "headroom.checkpoint.policy", "the checkpoint policy is \"", policy.text(),
          "\", which names ", policy.named_blocks(), " blocks; this stack has ", count);
  auto next = blocks.begin();
  const auto run = [&](const CheckpointPolicy& part, int64_t size) {
    detail::check_policy(part, part.text());
    std::optional<detail::CheckpointStorageScope> storage;
    if (part.storage != CheckpointStorage::memory) storage.emplace(checkpoint_pack(part.storage));
    x = detail::run_blocks({next, next + size}, x, part, part.levels);
    next += size;
  };
  for (const auto& [size, part] : policy.first) run(part, size);
  run(policy.rest, blocks.end() - next);
  return x;
}

}  // namespace headroom::inline v0
