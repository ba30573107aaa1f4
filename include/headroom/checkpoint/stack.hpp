#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/checkpoint/function.hpp"
#include "headroom/checkpoint/policy.hpp"
#include "headroom/checkpoint/tiled.hpp"

namespace headroom::inline v0 {

/// One of a stack of blocks that keep the shape of their tokens [..., features]: stages one after the other.
struct StackBlock {
  /// A function of tokens that keeps their shape.
  struct Stage {
    std::function<at::Tensor(const at::Tensor&)> forward;
    std::vector<at::Tensor> parameters;     ///< all that forward uses
    std::vector<int64_t> independent_axes;  ///< dimensions of tokens that forward treats as batch, for `tiled`
  };
  std::vector<Stage> stages;

  /// All stages, x of [..., features].
  at::Tensor forward(at::Tensor x) const {
    for (const Stage& stage : stages) x = stage.forward(x);
    return x;
  }
};

namespace detail {

/// What the layers of a stage or block compute for all tokens of x, and what its parameters take, in bytes: enough to
/// tell whether there are so few tokens that gradients of weights decide.
struct StageSize {
  double activations = 0, parameters = 0;

  StageSize(const StackBlock::Stage& stage, const at::Tensor& x) {
    if (x.numel() == 0) return;
    int64_t features = x.size(-1);  // of a token: its input, and a row for each row of a weight
    for (const at::Tensor& p : stage.parameters) {
      if (p.dim() == 2) features += p.size(0);
      parameters += static_cast<double>(p.nbytes());
    }
    activations = static_cast<double>(x.nbytes()) / static_cast<double>(x.size(-1)) * static_cast<double>(features);
  }
};

/// The largest of the axes that a stage is independent along, in so many slices that what its layers compute for one is
/// about 8 MiB, which keeps all threads busy, whatever the widths; or as much as its parameters take, whose gradients
/// each slice adds.
inline Slices slices_of(const StackBlock::Stage& stage, const at::Tensor& x) {
  constexpr double kSliceBytes = 8 << 20;
  Slices slices;  // as many as there can be
  for (const int64_t axis : stage.independent_axes) {
    if (x.size(axis) > slices.count) slices = {axis, x.size(axis)};
  }
  const StageSize size(stage, x);
  const double count = std::ceil(size.activations / std::max(kSliceBytes, size.parameters));
  slices.count = std::clamp<int64_t>(static_cast<int64_t>(count), 1, slices.count);
  return slices;
}

/// Whether slices lower the peak of a block's backward by more than they add: a second copy of gradients of weights,
/// and the gradient of x, which is put together.
inline bool slices_pay(const StackBlock& block, const at::Tensor& x) {
  double whole = 0, sliced = 0, whole_peak = 0, sliced_peak = 0, parameters = 0;
  for (const StackBlock::Stage& stage : block.stages) {
    const StageSize size(stage, x);
    const double slice = size.activations / static_cast<double>(slices_of(stage, x).count);
    whole += size.activations;
    sliced += slice;
    // the stages up to this one, and the gradients of what it computed
    whole_peak = std::max(whole_peak, whole + size.activations);
    sliced_peak = std::max(sliced_peak, sliced + slice);
    parameters += size.parameters;
  }
  return whole_peak - sliced_peak > 2 * parameters + static_cast<double>(x.nbytes());
}

inline at::Tensor run_tiled(const StackBlock& block, const at::Tensor& x) {
  std::vector<TiledStage> stages;
  std::vector<at::Tensor> parameters;
  for (const StackBlock::Stage& stage : block.stages) {
    stages.push_back({stage.forward, [stage](const at::Tensor& t) { return slices_of(stage, t); }});
    parameters.insert(parameters.end(), stage.parameters.begin(), stage.parameters.end());
  }
  return reentrant_call(std::make_shared<const TiledWork>(std::move(stages)), {x}, parameters)[0];
}

/// Whether a block has so many tokens that keeping results of its operators is worth it: gradients of weights, which
/// grow while they are still kept, are smaller.
inline bool keeps_results(const StackBlock& block, const at::Tensor& x) {
  double activations = 0, parameters = 0;
  for (const StackBlock::Stage& stage : block.stages) {
    const StageSize size(stage, x);
    activations += size.activations;
    parameters += size.parameters;
  }
  return activations > parameters;
}

/// The inputs of checkpoints are kept as `policy` says, for its lifetime.
class PolicyStorageScope {
 public:
  explicit PolicyStorageScope(const CheckpointPolicy& policy) {
    if (policy.storage != CheckpointStorage::memory) scope_.emplace(checkpoint_pack(policy.storage));
  }

 private:
  std::optional<CheckpointStorageScope> scope_;
};

/// Runs blocks[first, last) under `levels` levels of checkpoints.
inline at::Tensor run_blocks(const std::vector<StackBlock>& blocks, at::Tensor x, const CheckpointPolicy& policy,
                             int64_t levels) {
  using Recompute = CheckpointPolicy::Recompute;
  const auto count = static_cast<int64_t>(blocks.size());
  const auto group_size =
      levels == 1 ? policy.every
                  : static_cast<int64_t>(std::ceil(
                        std::pow(count, static_cast<double>(levels - 1) / static_cast<double>(levels)) - 1e-9));
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
    if (policy.recompute == Recompute::none) {
      x = forward(x);
    } else if (policy.recompute == Recompute::selective && keeps_results(group.front(), x)) {
      x = selective_checkpoint(policy.keep, forward, x);
    } else if (policy.recompute == Recompute::tiled && slices_pay(group.front(), x)) {
      x = run_tiled(group.front(), x);
    } else {
      x = checkpoint(forward, x);
    }
  }
  return x;
}

}  // namespace detail

/// Blocks one after the other, with what `policy` says kept for backward. Gradients are those without checkpoints: bit
/// for bit, up to rounding with `tiled`, as of rounded inputs with `bf16`. `tiled` is `full` for a block without
/// independent axes, and `tiled` and `selective` are `full` for so few tokens that they would need more memory. Throws
/// headroom.checkpoint.policy, also for a policy that names more blocks than there are.
inline at::Tensor run_stack(const std::vector<StackBlock>& blocks, at::Tensor x, const StackPolicy& policy) {
  const auto count = static_cast<int64_t>(blocks.size());
  require(policy.named_blocks() <= count, "headroom.checkpoint.policy", "the checkpoint policy is \"", policy.text(),
          "\", which names ", policy.named_blocks(), " blocks; this stack has ", count);
  auto next = blocks.begin();
  const auto run = [&](const CheckpointPolicy& part, int64_t size) {
    detail::check_policy(part, part.text());
    const detail::PolicyStorageScope storage(part);
    x = detail::run_blocks({next, next + size}, x, part, part.levels);
    next += size;
  };
  for (const auto& [size, part] : policy.first) run(part, size);
  run(policy.rest, blocks.end() - next);
  return x;
}

/// What goes with a stack without being a block of it: forward(inputs...), computed again in backward unless `policy`
/// is `none`, with the inputs kept where the policy keeps those of blocks.
template <class F, class... Inputs>
auto run_under(const CheckpointPolicy& policy, F&& forward, Inputs&&... inputs) {
  if (policy.recompute == CheckpointPolicy::Recompute::none) {
    return std::invoke(std::forward<F>(forward), std::forward<Inputs>(inputs)...);
  }
  const detail::PolicyStorageScope storage(policy);
  return checkpoint(std::forward<F>(forward), std::forward<Inputs>(inputs)...);
}

}  // namespace headroom::inline v0
