#pragma once

#include <c10/core/Device.h>
#include <torch/types.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/course.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/passes.hpp"
#include "headroom/training/resumption.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/score.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/updates.hpp"

namespace headroom::inline v0::training {

/// Trains a separator on the device of its parameters. Given the configuration, the model's first parameters, the
/// source and a number of steps, everything that follows is determined; only a time budget makes the learning rate
/// depend on the clock.
class Trainer {
 public:
  /// With the loss of the configuration's model.
  Trainer(models::Separator model, const Config& config, BatchSource source);
  Trainer(models::Separator model, const Config& config, BatchSource source, Loss loss);
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;
  ~Trainer();

  /// Trains until the end that `options` names, or until it is told to stop. Saved states, each beside its weights as a
  /// safetensors file: last.pt every checkpoint_every epochs and at the end, best.pt after each epoch that is better
  /// than all before. Throws headroom.training.non_finite, and headroom.training.state.write or headroom.weights.write
  /// when a file cannot be written.
  Summary run(const RunOptions& options);

  /// One optimizer step: the mean loss of its examples.
  double step(double learning_rate);

  /// Examples in one forward pass: the configuration's, or less since memory ran out.
  int64_t microbatch() const {
    const int64_t batch = config_.training.batch_size;
    const bool split = config_.training.split_on_out_of_memory && state_.microbatch > 0;
    return split ? std::min(state_.microbatch, batch) : batch;
  }

  /// Highest sum of all tensors since run() began.
  int64_t peak_bytes() const { return meter_.peak(); }

  /// Everything needed to go on later; its tensors share memory with the model and the optimizer.
  TrainingState state();

  /// Goes on from a state; `what` names it in messages. Returns how the configuration differs from the one that the
  /// state was trained with. Where that makes losses or scores incomparable (another loss, data or segments), the best
  /// score so far is forgotten and the epoch under way begins anew.
  ///
  /// Throws headroom.training.state.config when a difference makes it another model: other shapes, or the same
  /// parameters with another meaning, such as stems in another order. Throws headroom.training.state.structure when
  /// the tensors do not fit and headroom.training.state.random; all these leave the model as it was.
  std::vector<Difference> resume(const TrainingState& state, const std::string& what);

 private:
  StepReport report(const Course& course, double learning_rate) const {
    const int64_t epoch_step = state_.unfinished_steps;
    return {.step = state_.step,
            .epoch = static_cast<int64_t>(state_.epoch_losses.size()) + 1,
            .epoch_step = epoch_step,
            .epoch_steps_in_run = std::min(epoch_step, course.steps_taken(state_)),
            .epoch_seconds = course.epoch_elapsed(),
            .steps_per_epoch = std::max(config_.training.steps_per_epoch, epoch_step),
            .loss = unfinished_mean(),
            .learning_rate = learning_rate,
            .live_bytes = meter_.live(),
            .peak_bytes = meter_.peak(),
            .microbatch = microbatch()};
  }

  /// Mean loss of the epoch that is under way.
  double unfinished_mean() const { return state_.unfinished_loss / static_cast<double>(state_.unfinished_steps); }

  /// Runs f(false), and f(true) when memory ran out and the configuration wants another attempt.
  template <std::invocable<bool> F>
  void repeatable(F&& f) {
    if (!config_.training.split_on_out_of_memory) return f(false);
    run_twice_if_out_of_memory(device_, [&, again = false]() mutable { f(std::exchange(again, true)); });
  }

  void finish_epoch(const RunOptions& options, Summary& summary) {
    const TrainingConfig& training = config_.training;
    const double loss = unfinished_mean();
    state_.epoch_losses.push_back(loss);
    state_.unfinished_loss = 0;
    state_.unfinished_steps = 0;
    const auto epoch = static_cast<int64_t>(state_.epoch_losses.size());
    judge(options, loss, epoch % training.validation_every == 0, summary);
    if (epoch % training.checkpoint_every == 0) save(options, "last");
  }

  /// Saves the best when the model is better than ever.
  void judge(const RunOptions& options, double loss, bool validation_due, Summary& summary) {
    Score score{.metric = "training loss", .value = loss, .more_is_better = false};
    if (options.validate) {
      if (!validation_due) return;
      const auto averages = updates_.with_averages();
      score = {.metric = "validation nSDR", .value = options.validate()};
      summary.validation = score.value;
    }
    const bool is_best = improves(state_, score);
    if (config_.training.schedule == "plateau") state_.plateau.take(is_best, config_.training.plateau_patience);
    if (is_best) save(options, "best");
  }

  /// Ends a run: the epoch that is not over is judged like one that is, unless the run was told to stop.
  void finish(const RunOptions& options, const Course& course, Summary& summary) {
    summary.epoch_losses = state_.epoch_losses;
    if (state_.unfinished_steps > 0) {
      const double loss = unfinished_mean();
      summary.epoch_losses.push_back(loss);
      if (!summary.stopped) judge(options, loss, true, summary);
    }
    save(options, "last");
    summary.steps = state_.step;
    summary.seconds = course.elapsed();
    summary.peak_bytes = meter_.peak();
    summary.best_metric = state_.best_metric;
    summary.best_score = state_.best_score;
  }

  /// Weights first: a run that is killed in between goes on from a state of before, and writes them again.
  void save(const RunOptions& options, const std::string& name) {
    if (options.folder.empty()) return;
    const TrainingState now = state();
    save_weights(options.folder / (name + ".safetensors"), now);
    save_state(options.folder / (name + ".pt"), now);
  }

  models::Separator model_;
  Config config_;
  Passes passes_;
  Updates updates_;
  std::optional<optim::InBackward> in_backward_;
  c10::Device device_;
  MemoryMeter meter_;
  TrainingState state_;
};

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING Trainer::Trainer(models::Separator model, const Config& config, BatchSource source, Loss loss)
    : model_(std::move(model)),
      config_(config),
      passes_(model_, config.training, std::move(source), std::move(loss)),
      updates_(*model_, config),
      device_(model_->parameters().front().device()),
      meter_(device_) {
  name_modules(*model_);
  if (config_.training.optimizer_in_backward) {
    in_backward_.emplace(updates_.optimizer(), [this](const torch::Tensor& parameter) {
      passes_.require_finite(state_.step, parameter.grad().norm().item<double>(), "gradient norm");
    });
  }
}

HEADROOM_TRAINING Trainer::Trainer(models::Separator model, const Config& config, BatchSource source)
    : Trainer(std::move(model), config, std::move(source), loss_of(config)) {}

HEADROOM_TRAINING Trainer::~Trainer() = default;

HEADROOM_TRAINING Summary Trainer::run(const RunOptions& options) {
  // LibTorch's first call of exp, log or sqrt settles how all are computed; threads that make it at once may get half
  // the digits
  torch::exp(torch::zeros({1}));
  Course course(options, config_.training, state_.step);
  Summary summary;
  meter_.reset_peak();
  while (course.steps_left(state_) && !summary.stopped) {
    const double elapsed = course.elapsed();
    if (!course.time_left(elapsed)) break;
    const double rate = course.learning_rate(state_, elapsed);
    state_.unfinished_loss += step(rate);
    ++state_.unfinished_steps;
    if (options.on_step) options.on_step(report(course, rate));
    if (state_.unfinished_steps >= config_.training.steps_per_epoch) {
      finish_epoch(options, summary);
      course.begin_epoch();
    }
    summary.stopped = course.steps_left(state_) && options.stop_requested && options.stop_requested();
  }
  finish(options, course, summary);
  return summary;
}

HEADROOM_TRAINING double Trainer::step(double learning_rate) {
  const TrainingConfig& training = config_.training;
  updates_.set_learning_rate(learning_rate);
  model_->train();
  updates_.optimizer().zero_grad();
  double mean_loss = 0;
  if (training.split_on_out_of_memory) {
    state_.microbatch = run_within({.device = device_}, *model_, halvings(microbatch()), [&](int64_t most) {
      updates_.optimizer().zero_grad();
      mean_loss = passes_.accumulate(state_.step, most);
    });
    if (state_.microbatch == training.batch_size) state_.microbatch = 0;
  } else {
    mean_loss = passes_.accumulate(state_.step, microbatch());
  }
  if (!in_backward_) {
    const Phase phase("optimizer");
    repeatable([&](bool) { passes_.require_finite(state_.step, updates_.clip_gradients(), "gradient norm"); });
    repeatable([&](bool again) {
      optim::Optimizer& optimizer = updates_.optimizer();
      again ? optimizer.continue_step() : static_cast<void>(optimizer.step());
    });
  }
  repeatable([&](bool) { updates_.finish_step(); });
  ++state_.step;
  return mean_loss;
}

HEADROOM_TRAINING TrainingState Trainer::state() {
  TrainingState now = state_;
  now.config = to_json(config_);
  now.random = random_state();
  now.model = tensors_of(*model_);
  updates_.save(now);
  return now;
}

HEADROOM_TRAINING std::vector<Difference> Trainer::resume(const TrainingState& state, const std::string& what) {
  const Config before = parse_config(state.config, what + " (configuration)");
  const std::vector<Difference> changes = differences(before, config_);
  check_same_model(changes, what);
  check_random_state(state.random, what);
  copy_tensors(state.model, tensors_of(*model_), what);
  updates_.restore(state, what);
  set_random_state(state.random);
  state_ = state;
  state_.model.clear();
  state_.optimizer.clear();
  state_.lora.clear();
  state_.ema.clear();
  if (state_.unfinished_steps < 0) state_.unfinished_steps = state_.step % before.training.steps_per_epoch;
  forget_incomparable(changes, state_);
  return changes;
}
#endif

}  // namespace headroom::inline v0::training
