#pragma once

#include <c10/core/Device.h>
#include <torch/types.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/core/score_rows.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/phase_meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/bad_numbers.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/course.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/passes.hpp"
#include "headroom/training/resumption.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/saved_states.hpp"
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
  /// With another loss.
  Trainer(models::Separator model, const Config& config, BatchSource source, Loss loss);
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;
  ~Trainer();

  /// Trains until the end that `options` names, or until it is told to stop. Saved states, each beside its weights as a
  /// safetensors file: last.pt as often as the configuration says and at the end, best.pt after each epoch that is
  /// better than all before; see SavedStates. Throws headroom.training.non_finite, headroom.training.state.room before
  /// the first step, and headroom.training.state.write or headroom.weights.write when a file cannot be written.
  Summary run(const RunOptions& options);

  /// One optimizer step: the mean loss of its examples. When the loss or a gradient is not finite the step is skipped:
  /// parameters, buffers and the optimizer stay as they are, and what is returned is not finite. Throws
  /// headroom.training.non_finite once that many in a row were skipped, and for a gradient with the optimizer in the
  /// backward pass.
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
  /// A run under way.
  struct Run {
    const RunOptions& options;
    Course course;
    SavedStates saved;
    Summary summary = {};
  };

  StepReport report(const Course& course, double learning_rate) const {
    const int64_t epoch_step = state_.unfinished_steps;
    return {.step = state_.step,
            .epoch = static_cast<int64_t>(state_.epoch_losses.size()) + 1,
            .epoch_step = epoch_step,
            .epoch_steps_in_run = std::min(epoch_step, course.steps_taken(state_)),
            .epoch_seconds = course.epoch_elapsed(),
            .skipped_steps = state_.skipped_steps,
            .steps_per_epoch = std::max(config_.training.steps_per_epoch, epoch_step),
            .loss = unfinished_mean(),
            .learning_rate = learning_rate,
            .gradient_norm = gradient_norm_,
            .live_bytes = meter_.live(),
            .peak_bytes = meter_.peak(),
            .examples = passes_.examples(),
            .microbatch = microbatch()};
  }

  /// What was measured since the last call, which the summary takes note of.
  std::vector<PhaseUse> take_phases(Summary& summary) {
    std::vector<PhaseUse> phases = phases_.take();
    for (const PhaseUse& use : phases) add_phase(summary.phases, use);
    return phases;
  }

  /// What a validation's score is called.
  std::string validation_metric() const {
    return "validation " + std::string(core::metric_name(config_.training.best_metric).name);
  }

  /// Whether as many validations in a row as training.patience were no better than the best.
  bool out_of_patience(const RunOptions& options) const {
    const int64_t patience = config_.training.patience;
    if (!options.validate || patience == 0 || state_.validations_since_best < patience) return false;
    return state_.best_metric.empty() || state_.best_metric == validation_metric();  // and no other score
  }

  /// Mean loss of the epoch that is under way; not finite while all of its steps were skipped.
  double unfinished_mean() const {
    return state_.unfinished_loss / static_cast<double>(state_.unfinished_steps - state_.unfinished_skipped);
  }

  /// Takes a step and adds it to the epoch under way.
  void step(Run& run, double elapsed) {
    const double rate = run.course.learning_rate(state_, elapsed);
    const double loss = step(rate);
    ++state_.unfinished_steps;
    if (core::detail::is_finite(loss)) {
      state_.unfinished_loss += loss;
    } else {
      ++state_.unfinished_skipped;
    }
    std::vector<PhaseUse> phases = take_phases(run.summary);
    if (!run.options.on_step) return;
    StepReport now = report(run.course, rate);
    now.step_loss = loss;
    now.seconds = run.course.elapsed() - elapsed;
    now.phases = std::move(phases);
    run.options.on_step(now);
  }

  /// Runs f(false), and f(true) when memory ran out and the configuration wants another attempt.
  template <std::invocable<bool> F>
  void repeatable(F&& f) {
    if (!config_.training.split_on_out_of_memory) return f(false);
    run_twice_if_out_of_memory(device_, [&, again = false]() mutable { f(std::exchange(again, true)); });
  }

  /// Clips the gradients and steps the optimizer, unless the norm is not finite.
  std::optional<BadNumber> update() {
    const Phase phase("optimizer");
    const PhaseMeter::Scope scope(phases_, "optimizer");
    repeatable([&](bool) { gradient_norm_ = updates_.clip_gradients(); });
    if (!core::detail::is_finite(*gradient_norm_)) {
      return bad_gradients(updates_.trained(), *gradient_norm_, state_.examples, passes_.examples());
    }
    repeatable([&](bool again) {
      optim::Optimizer& optimizer = updates_.optimizer();
      again ? optimizer.continue_step() : static_cast<void>(optimizer.step());
    });
    return std::nullopt;
  }

  void skip(const BadNumber& bad) {
    if (state_.skipped_in_a_row >= config_.training.skip_non_finite) stop_for(bad);
    ++state_.skipped_steps;
    ++state_.skipped_in_a_row;
    if (on_notice_) on_notice_("this step is skipped: " + describe(bad, state_.step + 1, origin_));
  }

  [[noreturn]] void stop_for(const BadNumber& bad) const {
    const int64_t before = state_.skipped_in_a_row;
    fail("headroom.training.non_finite", describe(bad, state_.step + 1, origin_),
         before > 0 ? "; the " + std::to_string(before) + " steps before it were skipped for the like" : "",
         "; the saved states on disk are those of before. Lower training.learning_rate, lengthen "
         "training.warmup_steps, or look for broken audio among these examples");
  }

  void finish_epoch(Run& run) {
    const TrainingConfig& training = config_.training;
    const double loss = unfinished_mean();
    state_.epoch_losses.push_back(loss);
    state_.unfinished_loss = 0;
    state_.unfinished_steps = 0;
    state_.unfinished_skipped = 0;
    const auto epoch = static_cast<int64_t>(state_.epoch_losses.size());
    judge(run, loss, epoch % training.validation_every == 0);
    save_last(run, epoch % training.checkpoint_every == 0);
    run.course.begin_epoch();
  }

  /// Saves the last state if it is due.
  void save_last(Run& run, bool due) {
    const double now = run.course.now();
    if (due || run.saved.due(state_.step, now)) run.saved.save_last(state(), now);
  }

  /// Saves the best when the model is better than ever.
  void judge(Run& run, double loss, bool validation_due) {
    Score score{.metric = "training loss", .value = loss, .more_is_better = false};
    if (run.options.validate) {
      if (!validation_due) return;
      score = {.metric = validation_metric(), .value = validate(run)};
      run.summary.validation = score.value;
    }
    const bool is_best = improves(state_, score);
    if (config_.training.schedule == "plateau") state_.plateau.take(is_best, config_.training.plateau_patience);
    if (is_best) run.saved.save_best(state());
  }

  double validate(Run& run) {
    double score = 0;
    {
      const PhaseMeter::Scope scope(phases_, "validation");
      const auto averages = updates_.with_averages();
      score = run.options.validate();
    }
    take_phases(run.summary);
    return score;
  }

  /// Ends a run: the epoch that is not over is judged like one that is, unless the run was told to stop.
  void finish(Run& run) {
    Summary& summary = run.summary;
    summary.epoch_losses = state_.epoch_losses;
    if (state_.unfinished_steps > 0) {
      const double loss = unfinished_mean();
      summary.epoch_losses.push_back(loss);
      if (!summary.stopped && !summary.out_of_patience) judge(run, loss, true);
    }
    if (state_.unfinished_steps > 0 || !run.saved.has(state_.step)) save_last(run, true);
    summary.steps = state_.step;
    summary.skipped_steps = state_.skipped_steps;
    summary.seconds = run.course.elapsed();
    summary.peak_bytes = meter_.peak();
    summary.best_metric = state_.best_metric;
    summary.best_score = state_.best_score;
  }

  models::Separator model_;
  Config config_;
  PhaseMeter phases_;
  Passes passes_;
  Updates updates_;
  std::optional<optim::InBackward> in_backward_;
  c10::Device device_;
  MemoryMeter meter_;
  std::optional<double> gradient_norm_;  ///< of the last step
  TrainingState state_;
  std::function<void(const std::string&)> on_notice_;
  std::function<std::string(int64_t)> origin_;
};

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING Trainer::Trainer(models::Separator model, const Config& config, BatchSource source, Loss loss)
    : model_(std::move(model)),
      config_(config),
      phases_(model_->parameters().front().device()),
      passes_(model_, config.training, std::move(source), std::move(loss), phases_),
      updates_(*model_, config),
      device_(model_->parameters().front().device()),
      meter_(device_) {
  name_modules(*model_);
  if (config_.training.optimizer_in_backward) {
    in_backward_.emplace(updates_.optimizer(), [this](const torch::Tensor& parameter) {
      const double norm = parameter.grad().norm().item<double>();
      if (core::detail::is_finite(norm)) return;
      stop_for(bad_gradients(updates_.trained(), norm, state_.examples, passes_.examples()));
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
  Run run{options, course, SavedStates(options.folder, config_.training, course.now())};
  if (run.saved.wanted()) {
    const TrainingState now = state();
    run.saved.require_room(updates_.file_bytes(now), file_bytes(now.model));
  }
  on_notice_ = options.on_notice;
  origin_ = options.origin;
  meter_.reset_peak();
  Summary& summary = run.summary;
  const auto goes_on = [&] { return run.course.steps_left(state_); };
  summary.out_of_patience = goes_on() && out_of_patience(options);
  while (goes_on() && !summary.stopped && !summary.out_of_patience) {
    const double elapsed = run.course.elapsed();
    if (!run.course.time_left(elapsed)) break;
    step(run, elapsed);
    if (state_.unfinished_steps >= config_.training.steps_per_epoch) {
      finish_epoch(run);
    } else {
      save_last(run, false);
    }
    summary.out_of_patience = goes_on() && out_of_patience(options);
    summary.stopped = goes_on() && options.stop_requested && options.stop_requested();
  }
  finish(run);
  return summary;
}

HEADROOM_TRAINING double Trainer::step(double learning_rate) {
  const TrainingConfig& training = config_.training;
  gradient_norm_.reset();
  updates_.set_learning_rate(learning_rate);
  model_->train();
  updates_.optimizer().zero_grad();
  std::optional<headroom::detail::StepStart> start;
  repeatable([&](bool) { start.emplace(*model_); });
  PassesResult result;
  const auto pass = [&](int64_t most) { result = passes_.accumulate(state_.examples, most); };
  if (training.split_on_out_of_memory) {
    state_.microbatch = run_within({.device = device_}, *model_, halvings(microbatch()), [&](int64_t most) {
      updates_.optimizer().zero_grad();  // of an attempt before
      pass(most);
    });
    if (state_.microbatch == training.batch_size) state_.microbatch = 0;
  } else {
    pass(microbatch());
  }
  if (!result.bad && !in_backward_) result.bad = update();
  if (result.bad) {
    start->restore();
    skip(*result.bad);
    result.mean_loss = result.bad->value;
  } else {
    const PhaseMeter::Scope scope(phases_, "optimizer");
    repeatable([&](bool) { updates_.finish_step(); });
    state_.skipped_in_a_row = 0;
  }
  ++state_.step;
  state_.examples += passes_.examples();
  return result.mean_loss;
}

HEADROOM_TRAINING TrainingState Trainer::state() {
  TrainingState now = state_;
  now.config = to_json(config_);
  now.random = random_state();
  if (!device_.is_cpu()) now.random_on_device = random_state(device_);
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
  if (state.random_on_device.defined() && !device_.is_cpu()) set_random_state(state.random_on_device, device_);
  state_ = state;
  state_.model.clear();
  state_.optimizer.clear();
  state_.lora.clear();
  state_.ema.clear();
  complete(state_, before.training);
  forget_incomparable(changes, config_.training, state_);
  return changes;
}
#endif

}  // namespace headroom::inline v0::training
