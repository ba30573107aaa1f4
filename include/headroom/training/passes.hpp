#pragma once

#include <c10/core/Device.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "headroom/core/finite.hpp"
#include "headroom/memory/phase_meter.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/bad_numbers.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

/// What came out of the forward and backward passes of a step.
struct PassesResult {
  double mean_loss = 0;
  std::optional<BadNumber> bad = {};  ///< the loss that was not finite; there is no backward pass then
};

/// The forward and backward passes of optimizer steps, each phase of which is measured.
class Passes {
 public:
  Passes(models::Separator model, const TrainingConfig& training, BatchSource source, Loss loss, PhaseMeter& phases)
      : model_(std::move(model)),
        batch_(training.batch_size),
        examples_(training.batch_size * training.gradient_accumulation_steps),
        bf16_(training.bf16),
        source_(std::move(source)),
        loss_(std::move(loss)),
        device_(model_->parameters().front().device()),
        phases_(phases) {}

  /// Examples in a step.
  int64_t examples() const { return examples_; }

  /// Runs over the examples of a step, from `first` on, at most `most` of a batch at a time, so that the gradients are
  /// those of the mean loss. Ends with the first loss that is not finite.
  PassesResult accumulate(int64_t first, int64_t most) {
    PassesResult result;
    for (int64_t done = 0, count = 0; done < examples_; done += count) {
      count = std::min(most, batch_ - done % batch_);
      const Example example = read(first + done, count);
      const torch::Tensor estimate = forward(example.mixture);  // [B,N,C,S]
      const torch::Tensor loss =
          this->loss(estimate, example.stems) / (static_cast<double>(examples_) / static_cast<double>(count));
      const double value = loss.item<double>();
      result.mean_loss += value;
      if (!core::detail::is_finite(value)) {
        result.bad = bad_loss(*model_, value, first + done, example, estimate);
        return result;
      }
      const PhaseMeter::Scope scope(phases_, "backward");
      loss.backward();
    }
    return result;
  }

 private:
  Example read(int64_t first, int64_t count) {
    const PhaseMeter::Scope scope(phases_, "data");
    const Example example = source_(first, count);
    return {example.mixture.to(device_), example.stems.to(device_)};
  }

  torch::Tensor forward(const torch::Tensor& mixture) {
    const PhaseMeter::Scope scope(phases_, "forward");
    std::optional<headroom::detail::AutocastGuard> autocast;
    if (bf16_) autocast.emplace(compute_device(mixture).type(), at::kBFloat16);
    return model_(mixture);
  }

  torch::Tensor loss(const torch::Tensor& estimate, const torch::Tensor& stems) {
    const Phase phase("loss");
    const PhaseMeter::Scope scope(phases_, "loss");
    const auto type = at::promote_types(estimate.scalar_type(), torch::kFloat);  // not in bfloat16
    return loss_(estimate.to(type), stems);
  }

  models::Separator model_;
  int64_t batch_, examples_;  // in a forward pass of a whole batch, in a step
  bool bf16_;
  BatchSource source_;
  Loss loss_;
  c10::Device device_;
  PhaseMeter& phases_;
};

}  // namespace headroom::inline v0::training
