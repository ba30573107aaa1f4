#pragma once

#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/optim/adamw.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/schedule.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/validation.hpp"

namespace headroom::inline v0::training {

/// AdamW over all parameters of a module; vectors and scalars (norms, biases) are not decayed.
inline optim::AdamW make_optimizer(const torch::nn::Module& model, const TrainingConfig& config) {
  std::vector<torch::Tensor> matrices, vectors;
  for (const torch::Tensor& parameter : model.parameters()) {
    (parameter.dim() >= 2 ? matrices : vectors).push_back(parameter);
  }
  const auto options = [&](double weight_decay) {
    return std::make_unique<torch::optim::AdamWOptions>(torch::optim::AdamWOptions(config.learning_rate)
                                                            .betas({config.betas[0], config.betas[1]})
                                                            .weight_decay(weight_decay));
  };
  return optim::AdamW(
      std::vector<torch::optim::OptimizerParamGroup>{{matrices, options(config.weight_decay)}, {vectors, options(0)}},
      {}, optim::moment_format(config.optimizer_state));
}

namespace detail {

inline double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace detail

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
  /// A run under way: when and at which step it began, when the epoch did, and where it ends.
  struct Course {
    const RunOptions& options;
    std::function<double()> now;
    double start, epoch_start;
    int64_t first, last;
    double elapsed() const { return now() - start; }
  };

  Course course_of(const RunOptions& options) const {
    const TrainingConfig& training = config_.training;
    std::function<double()> now = options.clock ? options.clock : detail::steady_seconds;
    const int64_t epochs = training.epochs * training.steps_per_epoch;
    const int64_t last = options.steps.value_or(options.seconds ? std::numeric_limits<int64_t>::max() : epochs);
    const double start = now();
    return {options, std::move(now), start, start, state_.step, last};
  }

  /// The learning rate of the next step. Where time limits the run it follows from the pace so far.
  double learning_rate(const Course& course, double elapsed) {
    int64_t total = course.last;
    if (const auto& seconds = course.options.seconds) {
      total =
          std::min(total, estimated_total_steps(course.first, state_.step, elapsed, *seconds, state_.seconds_per_step));
      if (state_.step > course.first) {
        state_.seconds_per_step = elapsed / static_cast<double>(state_.step - course.first);
      }
    }
    return learning_rate_at(schedule(), state_.step, total);
  }

  StepReport report(const Course& course, double learning_rate) const {
    const int64_t epoch_step = state_.unfinished_steps;
    return {.step = state_.step,
            .epoch = static_cast<int64_t>(state_.epoch_losses.size()) + 1,
            .epoch_step = epoch_step,
            .epoch_steps_in_run = std::min(epoch_step, state_.step - course.first),
            .epoch_seconds = course.now() - course.epoch_start,
            .steps_per_epoch = std::max(config_.training.steps_per_epoch, epoch_step),
            .loss = unfinished_mean(),
            .learning_rate = learning_rate,
            .live_bytes = meter_.live(),
            .peak_bytes = meter_.peak(),
            .microbatch = microbatch()};
  }

  /// Ends a run: the epoch that is not over is judged like one that is, unless the run was told to stop.
  void finish(const Course& course, Summary& summary) {
    summary.epoch_losses = state_.epoch_losses;
    if (state_.unfinished_steps > 0) {
      const double loss = unfinished_mean();
      summary.epoch_losses.push_back(loss);
      if (!summary.stopped) judge(course.options, loss, true, summary);
    }
    save(course.options, "last");
    summary.steps = state_.step;
    summary.seconds = course.elapsed();
    summary.peak_bytes = meter_.peak();
    summary.best_metric = state_.best_metric;
    summary.best_score = state_.best_score;
  }

  static void check_same_model(const std::vector<Difference>& changes, const std::string& what) {
    std::string bound;
    for (const Difference& change : changes) {
      if (change.bound) bound += "\n  " + describe(change);
    }
    require(bound.empty(), "headroom.training.state.config", what,
            " was trained as another model; go on with the configuration saved in it, or start anew", bound);
  }

  /// Losses and scores are only compared, or added up, with those of before when they measure the same.
  void forget_incomparable(const std::vector<Difference>& changes) {
    bool losses = false, scores = false;
    for (const auto& [path, before, after, bound] : changes) {
      const bool segments = path == "training.segment_length";
      losses |= segments || path.starts_with("loss.") || (path.starts_with("data.") && path != "data.path");
      scores |= segments || path == "training.validation_segments";
    }
    if (losses) {
      state_.unfinished_steps = 0;
      state_.unfinished_loss = 0;
    }
    if (state_.best_metric == "training loss" ? losses : scores) state_.best_metric.clear();
  }

  /// Mean loss of the epoch that is under way.
  double unfinished_mean() const { return state_.unfinished_loss / static_cast<double>(state_.unfinished_steps); }

  Schedule schedule() const {
    return {config_.training.learning_rate, config_.training.warmup_steps, config_.training.min_learning_rate_ratio};
  }

  /// Forward and backward passes over the examples of a step, at most `most` of a batch at a time, so that the
  /// gradients are those of the mean loss, which is returned.
  double accumulate(int64_t most) {
    const int64_t batch = config_.training.batch_size;
    const int64_t examples = batch * config_.training.gradient_accumulation_steps;
    double mean_loss = 0;
    for (int64_t done = 0, count = 0; done < examples; done += count) {
      count = std::min(most, batch - done % batch);
      const Example example = source_(state_.step * examples + done, count);
      const torch::Tensor estimate = forward(example.mixture.to(device_));  // [B,N,C,S]
      const torch::Tensor loss = this->loss(estimate, example.stems.to(device_)) /
                                 (static_cast<double>(examples) / static_cast<double>(count));
      mean_loss += loss.item<double>();
      require_finite(mean_loss, "loss");
      loss.backward();
    }
    return mean_loss;
  }

  /// Runs f(false), and f(true) when memory ran out and the configuration wants another attempt.
  template <std::invocable<bool> F>
  void repeatable(F&& f) {
    if (!config_.training.split_on_out_of_memory) return f(false);
    run_twice_if_out_of_memory(device_, [&, again = false]() mutable { f(std::exchange(again, true)); });
  }

  torch::Tensor forward(const torch::Tensor& mixture) {
    std::optional<headroom::detail::AutocastGuard> autocast;
    if (config_.training.bf16) {
      autocast.emplace(compute_device(mixture).type(), at::kBFloat16);
    }
    return model_(mixture);
  }

  torch::Tensor loss(const torch::Tensor& estimate, const torch::Tensor& stems) {
    const Phase phase("loss");
    const auto type = at::promote_types(estimate.scalar_type(), torch::kFloat);  // not in bfloat16
    return loss_(estimate.to(type), stems);
  }

  void require_finite(double value, const char* what) const {
    const int64_t count = config_.training.gradient_accumulation_steps * config_.training.batch_size;
    const int64_t first = state_.step * count;
    require(
        core::detail::is_finite(value), "headroom.training.non_finite", "the ", what, " is ", value, " at step ",
        state_.step + 1, ", examples ", first, " to ", first + count - 1,
        "; the saved states on disk are those of before. Lower training.learning_rate, lengthen training.warmup_steps, "
        "or look for broken audio among these examples");
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

  /// Saves the best when the model is better than ever. Scores of different kinds are not compared: the first
  /// validation replaces a best training loss.
  void judge(const RunOptions& options, double loss, bool validation_due, Summary& summary) {
    if (options.validate && !validation_due) {
      return;
    }
    const std::string metric = options.validate ? "validation nSDR" : "training loss";
    const double score = options.validate ? options.validate() : loss;
    if (options.validate) {
      summary.validation = score;
    }
    const bool better = options.validate ? score > state_.best_score : score < state_.best_score;
    if (better || metric != state_.best_metric) {
      state_.best_metric = metric;
      state_.best_score = score;
      save(options, "best");
    }
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
  BatchSource source_;
  Loss loss_;
  optim::AdamW optimizer_;
  std::optional<optim::InBackward> in_backward_;
  c10::Device device_;
  MemoryMeter meter_;
  TrainingState state_;
};

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING Trainer::Trainer(models::Separator model, const Config& config, BatchSource source, Loss loss)
    : model_(std::move(model)),
      config_(config),
      source_(std::move(source)),
      loss_(std::move(loss)),
      optimizer_(make_optimizer(*model_, config.training)),
      device_(model_->parameters().front().device()),
      meter_(device_) {
  name_modules(*model_);
  if (config_.training.optimizer_in_backward) {
    in_backward_.emplace(optimizer_, [this](const torch::Tensor& parameter) {
      require_finite(parameter.grad().norm().item<double>(), "gradient norm");
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
  Course course = course_of(options);
  Summary summary;
  meter_.reset_peak();
  while (state_.step < course.last && !summary.stopped) {
    const double elapsed = course.elapsed();
    if (options.seconds && elapsed >= *options.seconds) break;
    const double rate = learning_rate(course, elapsed);
    state_.unfinished_loss += step(rate);
    ++state_.unfinished_steps;
    if (options.on_step) options.on_step(report(course, rate));
    if (state_.unfinished_steps >= config_.training.steps_per_epoch) {
      finish_epoch(options, summary);
      course.epoch_start = course.now();
    }
    summary.stopped = state_.step < course.last && options.stop_requested && options.stop_requested();
  }
  finish(course, summary);
  return summary;
}

HEADROOM_TRAINING double Trainer::step(double learning_rate) {
  const TrainingConfig& training = config_.training;
  for (auto& group : optimizer_.param_groups()) {
    group.options().set_lr(learning_rate);
  }
  model_->train();
  optimizer_.zero_grad();
  double mean_loss = 0;
  if (training.split_on_out_of_memory) {
    state_.microbatch = run_within({.device = device_}, *model_, halvings(microbatch()),
                                   [&](int64_t most) { mean_loss = accumulate(most); });
    if (state_.microbatch == training.batch_size) state_.microbatch = 0;
  } else {
    mean_loss = accumulate(microbatch());
  }
  if (!in_backward_) {
    const Phase phase("optimizer");
    const double limit =
        training.clip_grad_norm > 0 ? training.clip_grad_norm : std::numeric_limits<double>::infinity();
    repeatable(
        [&](bool) { require_finite(torch::nn::utils::clip_grad_norm_(model_->parameters(), limit), "gradient norm"); });
    repeatable([&](bool again) { again ? optimizer_.continue_step() : static_cast<void>(optimizer_.step()); });
  }
  ++state_.step;
  return mean_loss;
}

HEADROOM_TRAINING TrainingState Trainer::state() {
  TrainingState now = state_;
  now.config = to_json(config_);
  now.random = random_state();
  now.model = tensors_of(*model_);
  now.optimizer = optimizer_tensors(optimizer_, *model_);
  return now;
}

HEADROOM_TRAINING std::vector<Difference> Trainer::resume(const TrainingState& state, const std::string& what) {
  const Config before = parse_config(state.config, what + " (configuration)");
  const std::vector<Difference> changes = differences(before, config_);
  check_same_model(changes, what);
  check_random_state(state.random, what);
  copy_tensors(state.model, tensors_of(*model_), what);
  restore_optimizer(optimizer_, *model_, state.optimizer, what);
  set_random_state(state.random);
  state_ = state;
  state_.model.clear();
  state_.optimizer.clear();
  if (state_.unfinished_steps < 0) state_.unfinished_steps = state_.step % before.training.steps_per_epoch;
  forget_incomparable(changes);
  return changes;
}
#endif

}  // namespace headroom::inline v0::training
