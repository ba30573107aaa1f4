#pragma once

#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headroom/audio/losses.hpp"
#include "headroom/audio/metrics.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/finite.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/optim/adamw.hpp"
#include "headroom/optim/in_backward.hpp"
#include "headroom/plan/recorder.hpp"
#include "headroom/runtime/autocast_state.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/schedule.hpp"
#include "headroom/training/state.hpp"

namespace headroom::inline v0::training {

/// Where examples come from: source(first, count) gives the examples first, …, first + count - 1 of an endless sequence
/// as `.mixture` [count,C,S] and `.stems` [count,N,C,S]. The same indices must give the same examples.
template <class Source>
concept BatchSource = requires(Source& source, int64_t index) {
  { source(index, index).mixture } -> std::convertible_to<torch::Tensor>;
  { source(index, index).stems } -> std::convertible_to<torch::Tensor>;
};

/// What happened in one optimizer step.
struct Progress {
  int64_t step = 0;                ///< optimizer steps taken
  int64_t epoch = 1;               ///< the epoch that this step belongs to, from 1
  int64_t epoch_step = 0;          ///< steps taken in this epoch
  int64_t epoch_steps_in_run = 0;  ///< those of them that this run took
  double epoch_seconds = 0;        ///< that they took
  int64_t steps_per_epoch = 0;     ///< of this epoch: more than configured when it was begun with longer ones
  double loss = 0;                 ///< mean over the epoch so far
  double learning_rate = 0;
  int64_t live_bytes = 0;  ///< held by tensors
  int64_t peak_bytes = 0;  ///< highest live_bytes so far
  int64_t microbatch = 0;  ///< examples in one pass: batch_size, or less since memory ran out
};

/// What came out of a run.
struct Summary {
  int64_t steps = 0;                 ///< optimizer steps taken since the first start
  double seconds = 0;                ///< wall clock of this run
  int64_t peak_bytes = 0;            ///< highest sum of all tensors in this run
  std::vector<double> epoch_losses;  ///< mean loss of each epoch; the last one may be unfinished
  std::optional<double> validation;  ///< last validation nSDR in dB
  std::string best_metric;           ///< what chose best.pt
  double best_score = 0;             ///< its best value
  bool stopped = false;              ///< ended because it was told to stop, before its end
};

/// How long a run takes and who is told. Without `steps` and `seconds` it takes the configuration's epochs.
struct RunOptions {
  std::optional<int64_t> steps = {};                  ///< end at this step, counted from the first start
  std::optional<double> seconds = {};                 ///< end after this wall-clock time; the schedule follows the pace
  std::filesystem::path folder = {};                  ///< for last.pt and best.pt; empty: no checkpoints
  std::function<double()> validate = {};              ///< nSDR in dB; without it the training loss chooses best.pt
  std::function<void(const Progress&)> on_step = {};  ///< called after each step
  std::function<bool()> stop_requested = {};          ///< asked after each step
  std::function<double()> clock = {};                 ///< seconds that only grow; default: std::chrono::steady_clock
};

namespace detail {

inline double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace detail

/// The loss that a configuration describes.
inline audio::SeparationLoss make_loss(const Config& config) {
  return audio::SeparationLoss(audio::SeparationLossOptions()
                                   .stft_weight(config.loss.stft_weight)
                                   .stft(audio::MultiResolutionStftLossOptions()
                                             .windows(config.loss.windows)
                                             .hop(config.loss.hop)
                                             .min_n_fft(config.loss.min_n_fft)));
}

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

/// Mean over the stems of the nSDR in dB that a model reaches on the first `count` examples of a source, taken
/// together. Stems that are silent in all of them say nothing and are left out.
/// Throws headroom.training.validation_silent when all are.
template <class Model, BatchSource Source>
double validation_nsdr(Model& model, Source& source, int64_t count) {
  const torch::NoGradGuard guard;
  const bool was_training = model->is_training();
  model->eval();
  std::vector<audio::NsdrAccumulator> stems;
  for (int64_t index = 0; index < count; ++index) {
    const auto example = source(index, 1);  // [1,C,S], [1,N,C,S]
    const torch::Tensor estimate = model->forward(example.mixture.to(model->parameters().front().device()));
    stems.resize(static_cast<std::size_t>(estimate.size(1)));
    for (std::size_t n = 0; n < stems.size(); ++n) {
      const auto stem = static_cast<int64_t>(n);
      audio::add(stems[n], example.stems.select(1, stem), estimate.select(1, stem).cpu());  // [1,C,S]
    }
  }
  model->train(was_training);
  double sum = 0, sounding = 0;
  for (const audio::NsdrAccumulator& stem : stems) {
    if (stem.reference_energy() > 0) {
      sum += stem.value();
      ++sounding;
    }
  }
  require(sounding > 0, "headroom.training.validation_silent", "every stem is silent in the first ", count,
          " validation examples; raise training.validation_segments or choose other tracks for `valid`");
  return sum / sounding;
}

/// Trains a separator. `Model` is a module holder whose forward takes mixtures [B,C,S] to stems [B,N,C,S]; the trainer
/// works on the device of its parameters. Given the configuration, the model's first parameters, the source and a
/// number of steps, everything that follows is determined; only a time budget makes the learning rate depend on the
/// clock.
template <class Model, BatchSource Source>
class Trainer {
 public:
  using Loss = std::function<torch::Tensor(const torch::Tensor& estimate, const torch::Tensor& stems)>;

  Trainer(Model model, const Config& config, Source source)
      : Trainer(std::move(model), config, std::move(source),
                [loss = make_loss(config)](const torch::Tensor& estimate, const torch::Tensor& stems) mutable {
                  return loss->forward(estimate, stems);
                }) {}

  Trainer(Model model, const Config& config, Source source, Loss loss)
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
        require_finite(parameter.grad().norm().template item<double>(), "gradient norm");
      });
    }
  }

  /// Trains until the end that `options` names, or until it is told to stop. Checkpoints: last.pt every
  /// checkpoint_every epochs and at the end, best.pt after each epoch that is better than all before.
  /// Throws headroom.training.non_finite, and headroom.training.state.write when a checkpoint cannot be written.
  Summary run(const RunOptions& options) {
    const TrainingConfig& training = config_.training;
    const std::function<double()> now = options.clock ? options.clock : detail::steady_seconds;
    // LibTorch's first call of exp, log or sqrt settles how all are computed; threads that make it at once may get half
    // the digits
    torch::exp(torch::zeros({1}));
    const double start = now();
    const int64_t first = state_.step;
    const int64_t last = options.steps.value_or(options.seconds ? std::numeric_limits<int64_t>::max()
                                                                : training.epochs * training.steps_per_epoch);
    Summary summary;
    meter_.reset_peak();
    double epoch_start = start;
    while (state_.step < last && !summary.stopped) {
      const double elapsed = now() - start;
      if (options.seconds && elapsed >= *options.seconds) {
        break;
      }
      const int64_t total = options.seconds
                                ? std::min(last, estimated_total_steps(first, state_.step, elapsed, *options.seconds,
                                                                       state_.seconds_per_step))
                                : last;
      if (options.seconds && state_.step > first) {
        state_.seconds_per_step = elapsed / static_cast<double>(state_.step - first);
      }
      const double learning_rate = learning_rate_at(schedule(), state_.step, total);

      state_.unfinished_loss += step(learning_rate);
      const int64_t epoch_step = ++state_.unfinished_steps;

      if (options.on_step) {
        options.on_step({.step = state_.step,
                         .epoch = static_cast<int64_t>(state_.epoch_losses.size()) + 1,
                         .epoch_step = epoch_step,
                         .epoch_steps_in_run = std::min(epoch_step, state_.step - first),
                         .epoch_seconds = now() - epoch_start,
                         .steps_per_epoch = std::max(training.steps_per_epoch, epoch_step),
                         .loss = unfinished_mean(),
                         .learning_rate = learning_rate,
                         .live_bytes = meter_.live(),
                         .peak_bytes = meter_.peak(),
                         .microbatch = microbatch()});
      }
      if (epoch_step >= training.steps_per_epoch) {
        finish_epoch(options, summary);
        epoch_start = now();
      }
      summary.stopped = state_.step < last && options.stop_requested && options.stop_requested();
    }
    summary.epoch_losses = state_.epoch_losses;
    if (state_.unfinished_steps > 0) {
      const double loss = unfinished_mean();
      summary.epoch_losses.push_back(loss);
      if (!summary.stopped) {
        judge(options, loss, true, summary);
      }
    }
    save(options, "last.pt");
    summary.steps = state_.step;
    summary.seconds = now() - start;
    summary.peak_bytes = meter_.peak();
    summary.best_metric = state_.best_metric;
    summary.best_score = state_.best_score;
    return summary;
  }

  /// One optimizer step: the mean loss of its examples.
  double step(double learning_rate) {
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
      repeatable([&](bool) {
        require_finite(torch::nn::utils::clip_grad_norm_(model_->parameters(), limit), "gradient norm");
      });
      repeatable([&](bool again) { again ? optimizer_.continue_step() : static_cast<void>(optimizer_.step()); });
    }
    ++state_.step;
    return mean_loss;
  }

  /// Examples in one forward pass: the configuration's, or less since memory ran out.
  int64_t microbatch() const {
    const int64_t batch = config_.training.batch_size;
    const bool split = config_.training.split_on_out_of_memory && state_.microbatch > 0;
    return split ? std::min(state_.microbatch, batch) : batch;
  }

  /// Highest sum of all tensors since run() began.
  int64_t peak_bytes() const { return meter_.peak(); }

  /// Everything needed to go on later; its tensors share memory with the model and the optimizer.
  TrainingState state() {
    TrainingState now = state_;
    now.config = to_json(config_);
    now.random = random_state();
    now.model = tensors_of(*model_);
    now.optimizer = optimizer_tensors(optimizer_, *model_);
    return now;
  }

  /// Goes on from a state; `what` names it in messages. Returns how the configuration differs from the one that the
  /// state was trained with. Where that makes losses or scores incomparable (another loss, data or segments), the best
  /// score so far is forgotten and the epoch under way begins anew.
  ///
  /// Throws headroom.training.state.config when a difference makes it another model: other shapes, or the same
  /// parameters with another meaning, such as stems in another order. Throws headroom.training.state.structure when
  /// the tensors do not fit and headroom.training.state.random; all these leave the model as it was.
  std::vector<Difference> resume(const TrainingState& state, const std::string& what) {
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

 private:
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
      const auto example = source_(state_.step * examples + done, count);
      const torch::Tensor estimate = forward(example.mixture.to(device_));  // [B,N,C,S]
      const torch::Tensor loss = this->loss(estimate, example.stems.to(device_)) /
                                 (static_cast<double>(examples) / static_cast<double>(count));
      mean_loss += loss.template item<double>();
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
    return model_->forward(mixture);
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
        "; the checkpoints on disk are those of before. Lower training.learning_rate, lengthen training.warmup_steps, "
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
    if (epoch % training.checkpoint_every == 0) {
      save(options, "last.pt");
    }
  }

  /// Saves best.pt when the model is better than ever. Scores of different kinds are not compared: the first validation
  /// replaces a best training loss.
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
      save(options, "best.pt");
    }
  }

  void save(const RunOptions& options, const char* name) {
    if (!options.folder.empty()) {
      save_state(options.folder / name, state());
    }
  }

  Model model_;
  Config config_;
  Source source_;
  Loss loss_;
  optim::AdamW optimizer_;
  std::optional<optim::InBackward> in_backward_;
  c10::Device device_;
  MemoryMeter meter_;
  TrainingState state_;
};

}  // namespace headroom::inline v0::training
