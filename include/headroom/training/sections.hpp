#pragma once

#include <any>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "headroom/checkpoint/policy.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/track_scores.hpp"
#include "headroom/optim/moment.hpp"
#include "headroom/training/data_section.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/model_type.hpp"
#include "headroom/training/schedule.hpp"

namespace headroom::inline v0 {

/// true, false or text; false for none and true for full.
inline void to_json(auto& json, const StackPolicy& policy) {
  if (policy == StackPolicy(true) || policy == StackPolicy()) {
    json = policy == StackPolicy(true);
  } else {
    json = policy.text();
  }
}
inline void from_json(const auto& json, StackPolicy& policy) {
  policy = json.is_boolean() ? StackPolicy(json.template get<bool>()) : StackPolicy(json.template get<std::string>());
}

namespace training {

/// Of factors that are multiplied with floats.
inline constexpr double kLargestFactor = 1e30;

/// `model`: its type, the options of that type, and what models have in common.
class ModelConfig {
 public:
  /// The time-frequency transformer.
  ModelConfig() : ModelConfig("time_frequency_transformer") {}
  /// A model of a registered type with the default options. Throws headroom.training.model_type.
  explicit ModelConfig(const std::string& type) : type_(type), entry_(&find_model(type)), options_(entry_->defaults) {}

  StackPolicy gradient_checkpointing = {};
  std::string attention = "automatic";

  const std::string& type() const { return type_; }

  /// The options that the type was registered with. Throws headroom.training.model_options for a type with others.
  template <class Options>
  Options& as() {
    auto* const options = std::any_cast<Options>(&options_);
    require(options != nullptr, "headroom.training.model_options", "model.type is ", type_,
            ", whose options are of another C++ type; ask for those that it was registered with");
    return *options;
  }
  template <class Options>
  const Options& as() const {
    return const_cast<ModelConfig&>(*this).as<Options>();
  }

  /// What the registry has of the type; an empty function is one that the type does without. They take options().
  const ModelEntry<std::any>& entry() const { return entry_->entry; }
  const std::any& options() const { return options_; }

  /// Blocks that gradient_checkpointing decides about.
  int64_t blocks() const { return entry().blocks ? entry().blocks(options_) : 0; }

  static void describe(auto& self, auto&& field) {
    field("type", self.type_, {.bound = true}, "which model; the other keys are those of this type");
    self.describe_options(field);
    if (self.entry().blocks) {
      field(
          "gradient_checkpointing", self.gradient_checkpointing, {},
          "what of each layer is kept for the backward pass; `true` is `full`, docs/040_recomputation.md has a table");
    }
    if (self.entry().stored_scores_bytes) {
      field("attention", self.attention, {.choices = {"automatic", "tiled", "reference"}},
            "who computes attention; `reference` stores the scores");
    }
  }

 private:
  void describe_options(Fields& fields) { entry_->describe(options_, fields); }
  void describe_options(Fields& fields) const { entry_->describe_constant(options_, fields); }

  std::string type_;
  const ModelType* entry_;
  std::any options_;
};

/// `audio`: what goes in and what comes out.
struct AudioConfig {
  int64_t sample_rate = 44100;
  int64_t channels = 2;
  std::vector<std::string> stems = {"vocals", "drums", "bass", "other"};

  static void describe(auto& self, auto&& field) {
    field("sample_rate", self.sample_rate, {.at_least = 1, .at_most = 1'000'000, .bound = true},
          "of every audio file, Hz");
    field("channels", self.channels, {.at_least = 1, .at_most = 64, .bound = true}, "of every audio file");
    field("stems", self.stems, {.file_names = true, .bound = true},
          "file names without `.wav`, in the order of the model's outputs");
  }
};

/// `training`: segments, batches, the optimizer and its schedule, what is trained.
struct TrainingConfig {
  int64_t segment_length = 0;
  int64_t batch_size = 0;
  int64_t gradient_accumulation_steps = 1;
  int64_t steps_per_epoch = 100;
  int64_t epochs = 100;
  std::string optimizer = "adamw";
  double learning_rate = 3e-4;
  int64_t warmup_steps = 500;
  std::string schedule = "cosine";
  double min_learning_rate_ratio = 0.01;
  int64_t plateau_patience = 10;
  double plateau_factor = 0.5;
  double weight_decay = 0.01;
  std::array<double, 2> betas = {0.9, 0.999};
  double momentum = 0.95;
  double clip_grad_norm = 1.0;
  std::string optimizer_state = "full";
  bool optimizer_in_backward = false;
  double ema_decay = 0.0;
  std::vector<std::string> freeze = {};
  bool bf16 = false;
  bool split_on_out_of_memory = false;
  int64_t seed = 0;
  int64_t skip_non_finite = 10;
  int64_t checkpoint_every = 1;
  int64_t checkpoint_every_steps = 0;
  double checkpoint_every_minutes = 0;
  int64_t checkpoints_kept = 2;
  int64_t validation_every = 1;
  int64_t validation_segments = 16;
  std::string validation = "segments";
  std::vector<std::string> validation_metrics = {"nsdr"};
  std::string best_metric = "nsdr";
  int64_t patience = 0;
  int64_t log_every = 1;
  int64_t read_ahead = 2;
  int64_t reader_threads = 1;

  static void describe(auto& self, auto&& field) {
    constexpr double kMost = 1e9;
    field("segment_length", self.segment_length, {.required = true, .at_least = 1, .at_most = kMost},
          "of one example, samples");
    field("batch_size", self.batch_size, {.required = true, .at_least = 1, .at_most = 1e6},
          "examples in one forward pass");
    field("gradient_accumulation_steps", self.gradient_accumulation_steps, {.at_least = 1, .at_most = 1e6},
          "forward and backward passes in one optimizer step");
    field("steps_per_epoch", self.steps_per_epoch, {.at_least = 1, .at_most = kMost}, "optimizer steps in an epoch");
    field("epochs", self.epochs, {.at_least = 1, .at_most = 1e6},
          "`--steps` and `--seconds` override the length of the run");
    field("optimizer", self.optimizer, {.choices = {"adamw", "radam", "muon", "prodigy", "sgd"}},
          "what updates the parameters; muon: matrices, and AdamW the rest");
    field("learning_rate", self.learning_rate, {.at_most = 10, .above = 0},
          "after the warm-up; a factor, usually 1, with prodigy");
    field("warmup_steps", self.warmup_steps, {.at_least = 0, .at_most = kMost},
          "over which the learning rate rises from 0");
    field("schedule", self.schedule, {.choices = {kDecayNames.begin(), kDecayNames.end()}},
          "what becomes of the learning rate after the warm-up");
    field("min_learning_rate_ratio", self.min_learning_rate_ratio, {.at_least = 0, .at_most = 1},
          "cosine and linear end at this times learning_rate, plateau stops there");
    field("plateau_patience", self.plateau_patience, {.at_least = 0, .at_most = kMost},
          "validations without a better score, or epochs where there is no validation, before plateau lowers the "
          "learning rate with the next one");
    field("plateau_factor", self.plateau_factor, {.above = 0, .below = 1}, "how far plateau lowers it");
    field("weight_decay", self.weight_decay, {.at_least = 0, .at_most = 10}, "norms and biases have none");
    field("betas", self.betas, {.at_least = 0, .below = 1}, "of every optimizer but sgd");
    field("momentum", self.momentum, {.at_least = 0, .below = 1}, "of muon and sgd");
    field("clip_grad_norm", self.clip_grad_norm, {.at_least = 0, .at_most = kLargestFactor},
          "greatest norm of all gradients together; 0: no clipping");
    field("optimizer_state", self.optimizer_state,
          {.choices = {optim::kMomentFormatNames.begin(), optim::kMomentFormatNames.end()}},
          "how moments are stored: in 4, 2 or 1.02 bytes each; AdamW and most others have two a parameter");
    field("optimizer_in_backward", self.optimizer_in_backward, {},
          "update a parameter and free its gradient as soon as that is known; needs one pass a step and no clipping");
    field("ema_decay", self.ema_decay, {.at_least = 0, .below = 1},
          "of an average of the weights over steps, which is validated and exported; 0: none");
    field("freeze", self.freeze, {.may_be_empty = true},
          "patterns of names of parameters that stay as they are, such as `encoder.layers.0.*`");
    field("bf16", self.bf16, {}, "forward pass under bfloat16 autocast; loss and parameters stay float");
    field("split_on_out_of_memory", self.split_on_out_of_memory, {},
          "when a step runs out of memory, repeat it with batches in parts, and go on so");
    field("seed", self.seed, {.at_least = 0}, "of initialisation and sampling");
    describe_course(self, field);
  }

 private:
  /// What is saved, scored, told and read while the run goes on.
  static void describe_course(auto& self, auto&& field) {
    constexpr double kMost = 1e9;
    field("skip_non_finite", self.skip_non_finite, {.at_least = 0, .at_most = kMost},
          "steps in a row whose loss or gradient is not finite that are skipped before the run stops; 0: stop at once");
    field("checkpoint_every", self.checkpoint_every, {.at_least = 1}, "epochs between saved states");
    field("checkpoint_every_steps", self.checkpoint_every_steps, {.at_least = 0},
          "optimizer steps between saved states, in addition; 0: epochs alone");
    field("checkpoint_every_minutes", self.checkpoint_every_minutes, {.at_least = 0, .at_most = 1e6},
          "minutes between saved states, in addition; 0: epochs alone");
    field("checkpoints_kept", self.checkpoints_kept, {.at_least = 1, .at_most = 1000},
          "saved states that stay: the last one and those before it");
    field("validation_every", self.validation_every, {.at_least = 1}, "epochs between validations");
    field("validation_segments", self.validation_segments, {.at_least = 1, .at_most = 1e6},
          "examples of the validation split, the same each time");
    const std::vector<std::string> metrics(core::kMetrics.begin(), core::kMetrics.end());
    field("validation", self.validation, {.choices = {"segments", "tracks"}},
          "what is scored: those examples, or every track of the validation split from its beginning to its end");
    field("validation_metrics", self.validation_metrics, {.choices = metrics},
          "scores of each validation, docs/130_evaluation.md");
    field("best_metric", self.best_metric, {.choices = metrics}, "of validation_metrics: its mean chooses best.pt");
    field("patience", self.patience, {.at_least = 0, .at_most = kMost},
          "end after so many validations in a row that are no better than the best; 0: never");
    field("log_every", self.log_every, {.at_least = 1, .at_most = kMost}, "steps between lines of metrics.jsonl");
    field("read_ahead", self.read_ahead, {.at_least = 0, .at_most = 1000},
          "batches that are read while the step before computes; 0: none");
    field("reader_threads", self.reader_threads, {.at_least = 0, .at_most = 256},
          "that read ahead; the examples are the same with any number");
  }
};

/// `loss`: a weighted sum, see audio::SeparationLossOptions.
struct LossConfig {
  double l1_weight = 1.0;
  double mse_weight = 0.0;
  double masked_weight = 0.0;
  double masked_quantile = 0.95;
  bool masked_by_example = true;
  double stft_weight = 1.0;
  std::vector<int64_t> windows = {4096, 2048, 1024, 512, 256};
  int64_t hop = 147;
  int64_t min_n_fft = 2048;
  double log_wmse_weight = 0.0;
  double frequency_weight = 0.0;

  static void describe(auto& self, auto&& field) {
    const auto weight = [&](const char* name, auto& value, const char* meaning) {
      field(name, value, {.at_least = 0, .at_most = kLargestFactor}, meaning);
    };
    weight("l1_weight", self.l1_weight, "factor of the mean distance of samples; 0 leaves a term out");
    weight("mse_weight", self.mse_weight, "factor of the mean square");
    weight("masked_weight", self.masked_weight, "factor of the mean square of what is below the quantile of its stem");
    field("masked_quantile", self.masked_quantile, {.at_most = 1, .above = 0}, "share of a batch that counts there");
    field("masked_by_example", self.masked_by_example, {}, "whole examples count or do not; false: single samples");
    weight("stft_weight", self.stft_weight, "factor of the STFT loss");
    field("windows", self.windows, {.at_least = 16, .at_most = 1 << 20}, "Hann windows of the STFT loss, samples");
    field("hop", self.hop, {.at_least = 1}, "samples between frames of the STFT loss");
    field("min_n_fft", self.min_n_fft, {.at_least = 16, .at_most = 1 << 20}, "shorter windows are padded to this");
    weight("log_wmse_weight", self.log_wmse_weight, "factor of logWMSE, negated");
    weight("frequency_weight", self.frequency_weight, "factor of the mean distance of magnitudes of spectra");
  }

  /// Whether the loss of a batch is more than the mean of those of its examples.
  bool compares_examples() const { return masked_weight > 0; }
};

/// `lora`: changes of low rank of matrices, which are trained in the place of all parameters.
struct LoraConfig {
  int64_t rank = 0;
  double alpha = 8.0;
  std::vector<std::string> layers = {"*"};

  static void describe(auto& self, auto&& field) {
    field("rank", self.rank, {.at_least = 0, .at_most = 1024},
          "of the change of a matrix; 0: all parameters are trained");
    field("alpha", self.alpha, {.at_most = kLargestFactor, .above = 0}, "the change is multiplied by alpha / rank");
    field("layers", self.layers, {}, "patterns of names of linear layers, such as `*.to_qkv`");
  }
};

/// `inference`: how a recording is separated.
struct InferenceConfig {
  int64_t segment_length = 0;
  double overlap = 0.25;
  int64_t batch = 1;
  bool normalize = false;

  static void describe(auto& self, auto&& field) {
    field("segment_length", self.segment_length, {.at_least = 0, .at_most = 1e9},
          "that the model works on at a time, samples; 0: as trained");
    field("overlap", self.overlap, {.at_least = 0, .at_most = 0.999},
          "share of a segment that the next one covers again");
    field("batch", self.batch, {.at_least = 1, .at_most = 4096}, "segments in one call of the model");
    field("normalize", self.normalize, {}, "the model gets recordings with mean 0 and deviation 1, see audio::Level");
  }
};

/// Everything that a model and its training depend on, as read from a file.
struct Config {
  ModelConfig model;
  AudioConfig audio;
  DataConfig data;
  TrainingConfig training;
  LossConfig loss;
  LoraConfig lora;
  InferenceConfig inference;

  /// Samples that the model works on at a time when it separates.
  int64_t inference_segment() const {
    return inference.segment_length > 0 ? inference.segment_length : training.segment_length;
  }

  static void describe(auto& self, auto&& field) {
    field("model", self.model, {}, "which model, and its options");
    field("audio", self.audio, {}, "what goes in and what comes out");
    field("data", self.data, {}, "the data set and its augmentation");
    field("training", self.training, {}, "segments, batches, the optimizer and its schedule, what is trained");
    field("loss", self.loss, {}, "what is minimised");
    field("lora", self.lora, {}, "changes of low rank of matrices, in the place of all parameters");
    field("inference", self.inference, {}, "how a recording is separated");
  }
};

}  // namespace training
}  // namespace headroom::inline v0
