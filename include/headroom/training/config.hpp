#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/checkpoint/policy.hpp"
#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/training/json.hpp"

namespace headroom::inline v0 {

/// true, false or text; false for none and true for full.
inline void to_json(auto& json, const StackPolicy& policy) {
  if (policy == StackPolicy(true) || policy == StackPolicy()) {
    json = policy == StackPolicy(true);
  } else {
    json = policy.text();
  }
}
inline void from_json(const nlohmann::json& json, StackPolicy& policy) {
  policy = json.is_boolean() ? StackPolicy(json.get<bool>()) : StackPolicy(json.get<std::string>());
}

namespace training {

/// Of factors that are multiplied with floats.
inline constexpr double kLargestFactor = 1e30;

/// `model`: the time-frequency transformer.
struct ModelConfig {
  int64_t n_fft = 4096;
  int64_t hop_length = 1024;
  int64_t n_layers = 0;
  int64_t emb_dim = 0;
  int64_t n_heads = 0;
  std::vector<int64_t> ffn_hidden_dim;
  StackPolicy gradient_checkpointing = {};
  bool reversible = false;
  std::string attention = "automatic";

  /// Encoder blocks: each layer has one along frequency and one along time.
  int64_t blocks() const { return 2 * n_layers; }

  static void describe(auto& self, auto&& field) {
    constexpr double kWidest = 1 << 20;
    field("n_fft", self.n_fft, {.at_least = 16, .at_most = kWidest, .bound = true},
          "STFT size and Hann window, samples");
    field("hop_length", self.hop_length, {.at_least = 1, .bound = true}, "samples between frames, at most n_fft / 2");
    field("n_layers", self.n_layers, {.required = true, .at_least = 1, .at_most = 1000, .bound = true},
          "encoder layers");
    field("emb_dim", self.emb_dim, {.required = true, .at_least = 2, .at_most = kWidest, .bound = true},
          "width of a token, a multiple of 2 * n_heads");
    field("n_heads", self.n_heads, {.required = true, .at_least = 1, .at_most = kWidest, .bound = true},
          "attention heads");
    field("ffn_hidden_dim", self.ffn_hidden_dim, {.required = true, .at_least = 1, .at_most = kWidest, .bound = true},
          "widths of the feed-forward's hidden layers");
    field("gradient_checkpointing", self.gradient_checkpointing, {},
          "what of each layer is kept for the backward pass; `true` is `full`, docs/040_recomputation.md has a table");
    field("reversible", self.reversible, {.bound = true},
          "two streams, from which the backward pass computes all activations back: another model, for which "
          "gradient_checkpointing is false");
    field("attention", self.attention, {.choices = {"automatic", "tiled", "reference"}},
          "who computes attention; `reference` stores the scores");
  }
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

/// `data`: the data set and its augmentation.
struct DataConfig {
  std::string path;
  std::string draw = "uniform";
  double remix = 1.0;
  std::array<double, 2> gain = {0.25, 1.25};
  bool swap_channels = true;
  bool flip_polarity = true;

  static void describe(auto& self, auto&& field) {
    field("path", self.path, {.may_be_empty = true}, "MUSDB18-HQ folder, with `train` in it; `--data` overrides it");
    field("draw", self.draw, {.choices = {"uniform", "by_length"}},
          "every track equally often, or every segment of the data set");
    field("remix", self.remix, {.at_least = 0, .at_most = 1},
          "probability that an example takes each stem from a track and position of its own");
    field("gain", self.gain, {.at_least = 0, .at_most = 100}, "least and greatest random factor of a remixed stem");
    field("swap_channels", self.swap_channels, {}, "reverse the channels of half of the remixed stems");
    field("flip_polarity", self.flip_polarity, {}, "negate half of the remixed stems");
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
  int64_t checkpoint_every = 1;
  int64_t validation_every = 1;
  int64_t validation_segments = 16;

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
    field("checkpoint_every", self.checkpoint_every, {.at_least = 1}, "epochs between checkpoints");
    field("validation_every", self.validation_every, {.at_least = 1}, "epochs between validations");
    field("validation_segments", self.validation_segments, {.at_least = 1, .at_most = 1e6},
          "examples of the validation split, the same each time");
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

/// Everything that a training run depends on, as read from a JSON file.
struct Config {
  ModelConfig model;
  AudioConfig audio;
  DataConfig data;
  TrainingConfig training;
  LossConfig loss;

  static void describe(auto& self, auto&& field) {
    field("model", self.model, {}, "the time-frequency transformer");
    field("audio", self.audio, {}, "what goes in and what comes out");
    field("data", self.data, {}, "the data set and its augmentation");
    field("training", self.training, {}, "segments, batches, AdamW and its schedule");
    field("loss", self.loss, {}, "what is minimised");
  }
};

namespace detail {

/// More elements than any machine holds, and few enough for LibTorch to count their bytes.
inline constexpr double kMostElements = 1e15;

/// Elements of the widest tensor of a training step, about.
inline double elements_of_widest(const Config& config) {
  const auto& [model, audio, data, training, loss] = config;
  const double samples = static_cast<double>(training.segment_length) * static_cast<double>(training.batch_size);
  const auto per_sample = [](int64_t size, int64_t hop) {
    return static_cast<double>(size) / static_cast<double>(hop);
  };
  const int64_t hidden = model.ffn_hidden_dim.empty() ? 0 : std::ranges::max(model.ffn_hidden_dim);
  const auto width = static_cast<double>(std::max(3 * model.emb_dim, hidden));
  const double tokens = samples * per_sample(model.n_fft / 2 + 1, model.hop_length);
  const int64_t window = std::max(loss.min_n_fft, loss.windows.empty() ? 0 : std::ranges::max(loss.windows));
  const auto signals = static_cast<double>(audio.channels) * static_cast<double>(audio.stems.size() + 1);
  return std::max(tokens * width, samples * signals * per_sample(window, loss.hop));
}

/// Values that are fine one by one and impossible together. A rule is skipped when a member it looks at is wrong
/// already.
inline void check_together(const Config& config, std::vector<Problem>& problems) {
  std::set<std::string> wrong;
  for (const Problem& problem : problems) {
    wrong.insert(problem.path.substr(0, problem.path.find('[')));
  }
  const auto is_wrong = [&](const std::string& member) {
    return wrong.contains(member) || wrong.contains(member.substr(0, member.find('.'))) || wrong.contains("");
  };
  const auto rule = [&](std::initializer_list<const char*> members, auto&& holds, auto&&... text) {
    const bool readable = std::ranges::none_of(members, is_wrong);
    if (readable && !holds()) {
      std::ostringstream message;
      (message << ... << text);
      problems.push_back({*members.begin(), message.str()});
    }
  };
  const auto& [model, audio, data, training, loss] = config;

  rule(
      {"model.n_heads", "model.emb_dim"}, [&] { return model.emb_dim % model.n_heads == 0; }, "got ", model.n_heads,
      ", expected a divisor of model.emb_dim, which is ", model.emb_dim);
  rule(
      {"model.n_heads", "model.emb_dim"},
      [&] { return model.emb_dim % model.n_heads != 0 || model.emb_dim / model.n_heads % 2 == 0; }, "got ",
      model.n_heads, ", expected an even head dimension for the rotary embedding, emb_dim ", model.emb_dim, " / ",
      model.n_heads, " heads is odd");
  rule(
      {"model.reversible", "model.gradient_checkpointing"},
      [&] { return !model.reversible || model.gradient_checkpointing == StackPolicy(); },
      "got true, expected false or no model.gradient_checkpointing, which has nothing to store there");
  rule(
      {"model.gradient_checkpointing", "model.n_layers"},
      [&] { return model.gradient_checkpointing.named_blocks() <= model.blocks(); }, "got \"",
      model.gradient_checkpointing.text(), "\", which names ", model.gradient_checkpointing.named_blocks(),
      " blocks, expected at most two for each of the model.n_layers = ", model.n_layers, " layers");
  rule(
      {"model.n_fft"}, [&] { return model.n_fft % 2 == 0; }, "got ", model.n_fft, ", expected an even number");
  rule(
      {"model.hop_length", "model.n_fft"}, [&] { return model.hop_length <= model.n_fft / 2; }, "got ",
      model.hop_length, ", expected at most half of model.n_fft, which is ", model.n_fft,
      ", else the spectrum has no inverse");
  rule(
      {"training.segment_length", "model.n_fft"}, [&] { return training.segment_length >= model.n_fft; }, "got ",
      training.segment_length, ", expected at least model.n_fft, which is ", model.n_fft);
  const int64_t longest = std::max(loss.min_n_fft, loss.windows.empty() ? 0 : std::ranges::max(loss.windows));
  rule(
      {"training.segment_length", "loss.windows", "loss.min_n_fft", "loss.stft_weight"},
      [&] { return loss.stft_weight == 0 || training.segment_length >= longest; }, "got ", training.segment_length,
      ", expected at least the longest window of loss.windows and loss.min_n_fft, which is ", longest);
  rule(
      {"training.segment_length", "training.batch_size", "model.n_fft", "model.hop_length", "model.emb_dim",
       "model.ffn_hidden_dim", "loss.windows", "loss.hop", "audio.channels", "audio.stems"},
      [&] { return elements_of_widest(config) <= kMostElements; }, "got ", training.segment_length,
      ", which with training.batch_size ", training.batch_size, " makes a tensor of about ", elements_of_widest(config),
      " elements, expected at most ", kMostElements, "; lower one of the two, or raise model.hop_length or loss.hop");
  rule(
      {"training.warmup_steps", "training.epochs", "training.steps_per_epoch"},
      [&] { return 2 * training.warmup_steps <= training.epochs * training.steps_per_epoch; }, "got ",
      training.warmup_steps,
      ", expected at most half of the run, which is training.epochs * training.steps_per_epoch = ",
      training.epochs * training.steps_per_epoch, " steps");
  rule(
      {"training.optimizer_in_backward", "training.gradient_accumulation_steps"},
      [&] { return !training.optimizer_in_backward || training.gradient_accumulation_steps == 1; },
      "got true, expected false with training.gradient_accumulation_steps = ", training.gradient_accumulation_steps,
      ": every backward pass is a step then, and no gradient is left to add to");
  rule(
      {"training.optimizer_in_backward", "training.clip_grad_norm"},
      [&] { return !training.optimizer_in_backward || training.clip_grad_norm == 0; },
      "got true, expected false with training.clip_grad_norm = ", training.clip_grad_norm,
      ": the norm of all gradients together is not known before the first ones are used and freed");
  rule(
      {"training.optimizer_in_backward", "training.split_on_out_of_memory"},
      [&] { return !training.optimizer_in_backward || !training.split_on_out_of_memory; },
      "got true, expected false with training.split_on_out_of_memory = true: a step that has changed parameters "
      "already "
      "cannot be repeated");
  rule(
      {"data.gain"}, [&] { return data.gain[0] <= data.gain[1]; }, "got [", data.gain[0], ",", data.gain[1],
      "], expected the smaller factor first");
  rule(
      {"audio.stems"}, [&] { return std::set(audio.stems.begin(), audio.stems.end()).size() == audio.stems.size(); },
      "got a name twice, expected different stems");
}

/// An unknown key that is a valid one of another section gets told so.
inline void point_to_sections(const Config& config, std::vector<Problem>& problems) {
  const nlohmann::ordered_json sections = write_described(config);
  for (Problem& problem : problems) {
    const std::size_t dot = problem.path.find('.');
    const std::string key = dot == std::string::npos ? problem.path : problem.path.substr(dot + 1);
    for (const auto& [section, members] : sections.items()) {
      if (problem.text.starts_with("unknown key") && members.contains(key)) {
        problem.text = "unknown key; it belongs to `" + section + "`";
      }
    }
  }
}

}  // namespace detail

/// Reads a configuration from JSON text (// and /* */ comments allowed); `name` is what messages call it.
///
/// Throws headroom.training.json for text that is not JSON, with line and column, and headroom.training.config for one
/// that is no configuration, with every problem found: unknown keys and the nearest valid ones, missing keys, wrong
/// types, values out of bounds or impossible together. docs/070_training.md lists all keys.
inline Config parse_config(std::string_view text, const std::string& name) {
  Config config;
  std::vector<Problem> problems;
  read_described(parse_json(text, name), config, "", problems);
  detail::point_to_sections(config, problems);
  detail::check_together(config, problems);
  if (!problems.empty()) {
    std::ostringstream message;
    message << problems.size() << (problems.size() == 1 ? " problem in " : " problems in ") << name;
    for (const Problem& problem : problems) {
      message << "\n  " << name << ": " << (problem.path.empty() ? "the document" : problem.path) << ": "
              << problem.text;
    }
    fail("headroom.training.config", message.str(), "\nEvery key is described in docs/070_training.md");
  }
  return config;
}

namespace detail {

/// What a text file holds. Throws headroom.training.config_file, with `content` and `expected` in its text.
inline std::string read_text(const std::filesystem::path& path, const char* content, const char* expected) {
  constexpr std::uint64_t kMost = 16 << 20;
  const io::InputFile file(path, {"headroom.training.config_file", content, expected}, kMost);
  return file.read(0, file.size());
}

}  // namespace detail

/// Reads a configuration file. Throws headroom.training.config_file when it cannot be read, else like parse_config.
inline Config load_config(const std::filesystem::path& path) {
  return parse_config(detail::read_text(path, "a configuration", "a JSON file, such as those in examples/configs"),
                      path.string());
}

/// The configuration with all its defaults as JSON text that parse_config reads back to the same values.
inline std::string to_json(const Config& config) { return write_described(config).dump(2) + "\n"; }

/// The documentation of every key as a Markdown table: key, default, accepted values, meaning.
inline std::string config_table() {
  return "| key | default | accepted | meaning |\n|---|---|---|---|\n" + describe_markdown(Config{});
}

}  // namespace training
}  // namespace headroom::inline v0
