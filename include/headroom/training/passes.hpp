#pragma once

#include <c10/core/Device.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

/// The forward and backward passes of optimizer steps.
class Passes {
 public:
  Passes(models::Separator model, const TrainingConfig& training, BatchSource source, Loss loss)
      : model_(std::move(model)),
        batch_(training.batch_size),
        examples_(training.batch_size * training.gradient_accumulation_steps),
        bf16_(training.bf16),
        source_(std::move(source)),
        loss_(std::move(loss)),
        device_(model_->parameters().front().device()) {}

  /// Runs over the examples of step number `step`, at most `most` of a batch at a time, so that the gradients are those
  /// of the mean loss, which is returned. Throws headroom.training.non_finite.
  double accumulate(int64_t step, int64_t most) {
    double mean_loss = 0;
    for (int64_t done = 0, count = 0; done < examples_; done += count) {
      count = std::min(most, batch_ - done % batch_);
      const Example example = source_(step * examples_ + done, count);
      const torch::Tensor mixture = example.mixture.to(device_);  // [B,C,S]
      const torch::Tensor estimate = forward(mixture);            // [B,N,C,S]
      const torch::Tensor loss = this->loss(estimate, {mixture, example.stems.to(device_)}) /
                                 (static_cast<double>(examples_) / static_cast<double>(count));
      mean_loss += loss.item<double>();
      require_finite(step, mean_loss, "loss");
      loss.backward();
    }
    return mean_loss;
  }

  /// Throws headroom.training.non_finite, with the examples of step number `step`, unless `value` is finite.
  void require_finite(int64_t step, double value, const char* what) const {
    const int64_t first = step * examples_;
    require(
        core::detail::is_finite(value), "headroom.training.non_finite", "the ", what, " is ", value, " at step ",
        step + 1, ", examples ", first, " to ", first + examples_ - 1,
        "; the saved states on disk are those of before. Lower training.learning_rate, lengthen training.warmup_steps, "
        "or look for broken audio among these examples");
  }

 private:
  torch::Tensor forward(const torch::Tensor& mixture) {
    std::optional<headroom::detail::AutocastGuard> autocast;
    if (bf16_) autocast.emplace(compute_device(mixture).type(), at::kBFloat16);
    return model_(mixture);
  }

  torch::Tensor loss(const torch::Tensor& estimate, const Example& example) {
    const Phase phase("loss");
    const auto type = at::promote_types(estimate.scalar_type(), torch::kFloat);  // not in bfloat16
    return loss_(estimate.to(type), example.stems, example.mixture);
  }

  models::Separator model_;
  int64_t batch_, examples_;  // in a forward pass of a whole batch, in a step
  bool bf16_;
  BatchSource source_;
  Loss loss_;
  c10::Device device_;
};

}  // namespace headroom::inline v0::training
