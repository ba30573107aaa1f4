#pragma once

#include <any>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "headroom/checkpoint/policy.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/track_scores.hpp"
#include "headroom/training/data_section.hpp"
#include "headroom/training/described.hpp"
#include "headroom/training/model_type.hpp"

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

/// `training`: segments, batches, AdamW and its schedule.
struct TrainingConfig {
  int64_t segment_length = 0;
  int64_t batch_size = 0;
  int64_t gradient_accumulation_steps = 1;
  int64_t steps_per_epoch = 100;
  int64_t epochs = 100;
  double learning_rate = 3e-4;
  int64_t warmup_steps = 500;
  double min_learning_rate_ratio = 0.01;
  double weight_decay = 0.01;
  std::array<double, 2> betas = {0.9, 0.999};
  double clip_grad_norm = 1.0;
  std::string optimizer_state = "full";
  bool optimizer_in_backward = false;
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
    field("learning_rate", self.learning_rate, {.at_most = 10, .above = 0}, "of AdamW after the warm-up");
    field("warmup_steps", self.warmup_steps, {.at_least = 0, .at_most = kMost},
          "over which the learning rate rises from 0");
    field("min_learning_rate_ratio", self.min_learning_rate_ratio, {.at_least = 0, .at_most = 1},
          "the cosine ends at this times learning_rate");
    field("weight_decay", self.weight_decay, {.at_least = 0, .at_most = 10}, "of AdamW; norms and biases have none");
    field("betas", self.betas, {.at_least = 0, .below = 1}, "of AdamW");
    field("clip_grad_norm", self.clip_grad_norm, {.at_least = 0, .at_most = kLargestFactor},
          "greatest norm of all gradients together; 0: no clipping");
    field("optimizer_state", self.optimizer_state, {.choices = {"full", "bf16", "8bit"}},
          "how AdamW stores its moments: 8, 4 or 2.03 bytes a parameter");
    field("optimizer_in_backward", self.optimizer_in_backward, {},
          "update a parameter and free its gradient as soon as that is known; needs one pass a step and no clipping");
    field("bf16", self.bf16, {}, "forward pass under bfloat16 autocast; loss and parameters stay float");
    field("split_on_out_of_memory", self.split_on_out_of_memory, {},
          "when a step runs out of memory, repeat it with batches in parts, and go on so");
    field("seed", self.seed, {.at_least = 0}, "of initialisation and sampling");
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

/// `loss`: mean |estimate - stem| plus stft_weight times the multi-resolution STFT loss.
struct LossConfig {
  double stft_weight = 1.0;
  std::vector<int64_t> windows = {4096, 2048, 1024, 512, 256};
  int64_t hop = 147;
  int64_t min_n_fft = 2048;

  static void describe(auto& self, auto&& field) {
    field("stft_weight", self.stft_weight, {.at_least = 0, .at_most = kLargestFactor},
          "factor of the STFT loss; 0 leaves it out");
    field("windows", self.windows, {.at_least = 16, .at_most = 1 << 20}, "Hann windows of the STFT loss, samples");
    field("hop", self.hop, {.at_least = 1}, "samples between frames of the STFT loss");
    field("min_n_fft", self.min_n_fft, {.at_least = 16, .at_most = 1 << 20}, "shorter windows are padded to this");
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
  InferenceConfig inference;

  /// Samples that the model works on at a time when it separates.
  int64_t inference_segment() const {
    return inference.segment_length > 0 ? inference.segment_length : training.segment_length;
  }

  static void describe(auto& self, auto&& field) {
    field("model", self.model, {}, "which model, and its options");
    field("audio", self.audio, {}, "what goes in and what comes out");
    field("data", self.data, {}, "the data set and its augmentation");
    field("training", self.training, {}, "segments, batches, AdamW and its schedule");
    field("loss", self.loss, {}, "what is minimised");
    field("inference", self.inference, {}, "how a recording is separated");
  }
};

}  // namespace training
}  // namespace headroom::inline v0
