#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/checkpoint/policy.hpp"
#include "headroom/training/data_section.hpp"
#include "headroom/training/field.hpp"
#include "headroom/training/sections.hpp"

namespace headroom::inline v0::training {

/// Checks values that are fine one by one and impossible together, and appends what is wrong to `problems`.
class Rules {
 public:
  explicit Rules(std::vector<Problem>& problems) : problems_(problems) {
    for (const Problem& problem : problems) wrong_.insert(problem.path.substr(0, problem.path.find('[')));
  }

  /// Unless `holds()`, which looks at `members` such as "model.n_heads", the first of them is wrong: `text` says what
  /// was got and what is expected. Passed over when one of them is wrong already.
  template <class... Text>
  void operator()(std::initializer_list<const char*> members, auto&& holds, const Text&... text) {
    const bool readable = std::ranges::none_of(members, [this](const std::string& member) { return is_wrong(member); });
    if (!readable || holds()) return;
    std::ostringstream message;
    (message << ... << text);
    problems_.push_back({*members.begin(), message.str()});
  }

  /// Whether something in a section such as "model" is wrong already.
  bool any_wrong_in(const std::string& section) const {
    return is_wrong(section) ||
           std::ranges::any_of(wrong_, [&](const std::string& path) { return path.starts_with(section + "."); });
  }

 private:
  bool is_wrong(const std::string& member) const {
    const std::string section = member.substr(0, member.find('.'));
    return wrong_.contains(member) || wrong_.contains(section) || wrong_.contains("") ||
           (section == "model" && wrong_.contains("model.type"));
  }

  std::vector<Problem>& problems_;
  std::set<std::string> wrong_;
};

namespace detail {

/// More elements than any machine holds, and few enough for LibTorch to count their bytes.
inline constexpr double kMostElements = 1e15;

inline int64_t longest_window(const LossConfig& loss) {
  return std::max(loss.min_n_fft, loss.windows.empty() ? 0 : std::ranges::max(loss.windows));
}

/// Elements of the widest tensor of a training step, about.
inline double elements_of_widest(const Config& config) {
  const auto& [model, audio, data, training, loss, lora, inference] = config;
  const double samples = static_cast<double>(training.segment_length) * static_cast<double>(training.batch_size);
  const auto signals = static_cast<double>(audio.channels) * static_cast<double>(audio.stems.size() + 1);
  const double in_loss = samples * signals * static_cast<double>(longest_window(loss)) / static_cast<double>(loss.hop);
  const auto& of_model = model.entry().widest_tensor;
  return std::max(in_loss, of_model ? of_model(model.options(), samples) : 0);
}

inline void check_model(const Config& config, Rules& rule) {
  const auto& [model, audio, data, training, loss, lora, inference] = config;
  if (model.entry().check) model.entry().check(model.options(), config, rule);
  const int64_t named = model.blocks() > 0 ? model.gradient_checkpointing.named_blocks() : 0;
  rule(
      {"model.gradient_checkpointing"}, [&] { return rule.any_wrong_in("model") || named <= model.blocks(); }, "got \"",
      model.gradient_checkpointing.text(), "\", which names ", named, " blocks, expected at most the ", model.blocks(),
      " of the model");
}

inline void check_sizes(const Config& config, Rules& rule) {
  const auto& [model, audio, data, training, loss, lora, inference] = config;
  rule(
      {"training.segment_length", "loss.windows", "loss.min_n_fft", "loss.stft_weight"},
      [&] { return loss.stft_weight == 0 || training.segment_length >= longest_window(loss); }, "got ",
      training.segment_length, ", expected at least the longest window of loss.windows and loss.min_n_fft, which is ",
      longest_window(loss));
  rule(
      {"training.segment_length", "loss.frequency_weight"},
      [&] { return loss.frequency_weight == 0 || training.segment_length > 1024; }, "got ", training.segment_length,
      ", expected more than 1024 with loss.frequency_weight");
  if (rule.any_wrong_in("model")) return;
  rule(
      {"training.segment_length", "training.batch_size", "loss.windows", "loss.hop", "audio.channels", "audio.stems"},
      [&] { return elements_of_widest(config) <= kMostElements; }, "got ", training.segment_length,
      ", which with training.batch_size ", training.batch_size, " makes a tensor of about ", elements_of_widest(config),
      " elements, expected at most ", kMostElements,
      "; lower one of the two, or raise the hops of the model and loss.hop");
}

inline void check_loss(const Config& config, Rules& rule) {
  const LossConfig& loss = config.loss;
  rule(
      {"loss.l1_weight", "loss.mse_weight", "loss.masked_weight", "loss.stft_weight", "loss.log_wmse_weight",
       "loss.frequency_weight"},
      [&] {
        return loss.l1_weight + loss.mse_weight + loss.masked_weight + loss.stft_weight + loss.log_wmse_weight +
                   loss.frequency_weight >
               0;
      },
      "got 0 as all the others, expected one weight or more above 0");
  rule(
      {"loss.masked_by_example", "loss.masked_weight", "training.batch_size"},
      [&] { return loss.masked_weight == 0 || !loss.masked_by_example || config.training.batch_size > 1; },
      "got true, expected false with training.batch_size = 1: one example is not below the quantile of itself");
  rule(
      {"training.split_on_out_of_memory", "loss.masked_weight"},
      [&] { return !config.training.split_on_out_of_memory || !loss.compares_examples(); },
      "got true, expected false with loss.masked_weight, which compares the examples of a batch");
}

inline void check_optimizer(const Config& config, Rules& rule) {
  const TrainingConfig& training = config.training;
  rule(
      {"training.warmup_steps", "training.epochs", "training.steps_per_epoch"},
      [&] { return 2 * training.warmup_steps <= training.epochs * training.steps_per_epoch; }, "got ",
      training.warmup_steps,
      ", expected at most half of the run, which is training.epochs * training.steps_per_epoch = ",
      training.epochs * training.steps_per_epoch, " steps");
  rule(
      {"training.learning_rate", "training.optimizer"},
      [&] { return training.optimizer != "prodigy" || training.learning_rate >= 0.1; }, "got ", training.learning_rate,
      ", expected 0.1 or more with training.optimizer = \"prodigy\", which finds the learning rate and multiplies it "
      "with this; 1 is usual");
  rule(
      {"training.optimizer_in_backward", "training.optimizer"},
      [&] { return !training.optimizer_in_backward || training.optimizer != "prodigy"; },
      "got true, expected false with training.optimizer = \"prodigy\", which looks at all gradients before it updates "
      "the first parameter");
  rule(
      {"training.optimizer_in_backward", "lora.rank"},
      [&] { return !training.optimizer_in_backward || config.lora.rank == 0; },
      "got true, expected false with lora.rank = ", config.lora.rank,
      ": the gradients of matrices are freed at once already");
  rule(
      {"training.freeze", "lora.rank"}, [&] { return training.freeze.empty() || config.lora.rank == 0; },
      "got patterns, expected none with lora.rank = ", config.lora.rank,
      ", which trains the layers of lora.layers alone");
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
      "already cannot be repeated");
}

inline void check_validation(const TrainingConfig& training, Rules& rule) {
  rule(
      {"training.best_metric", "training.validation_metrics"},
      [&] {
        return std::ranges::find(training.validation_metrics, training.best_metric) !=
               training.validation_metrics.end();
      },
      "got \"", training.best_metric, "\", expected one of training.validation_metrics; add it to those");
}

inline void check_data(const DataConfig& data, Rules& rule) {
  const auto ordered = [&](const char* member, const std::array<double, 2>& pair) {
    rule(
        {member}, [&] { return pair[0] <= pair[1]; }, "got [", pair[0], ",", pair[1],
        "], expected the smaller number first");
  };
  ordered("data.gain", data.gain);
  ordered("data.equalizer_db", data.equalizer_db);
  ordered("data.pitch_semitones", data.pitch_semitones);
  ordered("data.tempo_factor", data.tempo_factor);
  ordered("data.noise_db", data.noise_db);
  rule(
      {"data.weights", "data.more_paths"},
      [&] { return data.weights.empty() || data.weights.size() == 1 + data.more_paths.size(); }, "got ",
      data.weights.size(), " numbers, expected none or ", 1 + data.more_paths.size(),
      ": one for data.path and each of data.more_paths");
}

/// Values that are fine one by one and impossible together.
inline void check_together(const Config& config, std::vector<Problem>& problems) {
  Rules rule(problems);
  check_model(config, rule);
  check_sizes(config, rule);
  check_loss(config, rule);
  check_optimizer(config, rule);
  check_validation(config.training, rule);
  check_data(config.data, rule);
  const std::vector<std::string>& stems = config.audio.stems;
  rule(
      {"audio.stems"}, [&] { return std::set(stems.begin(), stems.end()).size() == stems.size(); },
      "got a name twice, expected different stems");
  const std::vector<std::string>& others = config.data.accompaniment;
  rule(
      {"data.accompaniment", "audio.stems"},
      [&] {
        std::set<std::string> names(stems.begin(), stems.end());
        return std::ranges::all_of(others, [&](const std::string& name) { return names.insert(name).second; });
      },
      "got a name twice, or that of a stem, expected other files");
}

}  // namespace detail

/// Whether segments of a configuration may have so many samples, by what its model and its loss need.
inline bool takes_segments(Config config, int64_t samples) {
  config.training.segment_length = samples;
  std::vector<Problem> problems;
  detail::check_together(config, problems);
  return std::ranges::none_of(problems, [](const Problem& p) { return p.path == "training.segment_length"; });
}

}  // namespace headroom::inline v0::training
