#pragma once

#include <torch/types.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/io/input_file.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/metrics_file.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/run_page.hpp"
#include "headroom/training/separate.hpp"
#include "headroom/training/spectrogram.hpp"
#include "headroom/training/validation.hpp"

namespace headroom::inline v0::training {

/// What a run leaves for those who watch it, in its folder: metrics.jsonl, a line a step and a validation; report.html,
/// drawn from these lines anew after each epoch, each validation and each minute; and spectrograms.json, the pictures
/// of an excerpt before training and now, which the page shows. A run that is resumed in the same folder goes on with
/// them. Where a file cannot be written the run goes on, and `tell` is called once for each reason.
class RunRecord {
 public:
  using Tell = std::function<void(const std::string& problem)>;

  /// `step`: that the run begins after, 0 unless it is resumed. Throws headroom.training.metrics when metrics.jsonl
  /// cannot be written.
  RunRecord(std::filesystem::path folder, const Config& config, int64_t step, Tell tell);

  void step(const StepReport& report);

  /// Of the step that was told last.
  void validation(const Validation& validation, double seconds);

  /// An excerpt, mixture [C,S] and stems [N,C,S], and what the model makes of it now, [N,C,S].
  void excerpt(const Example& truth, const torch::Tensor& estimates);
  /// The same of the first example of a source.
  void excerpt(const models::Separator& model, const BatchSource& source);

  /// `how` the run ended, such as "stopped".
  void end(const std::string& how) { write_page(how, false); }

 private:
  void append(Json line);
  void tell(const std::string& problem) {
    if (told_.insert(problem).second) tell_(problem);
  }
  void write(const char* name, const std::string& text);
  void write_page(const std::string& state, bool running);
  Json pictures_of(const torch::Tensor& recordings, double loudest) const;

  std::filesystem::path folder_;
  Config config_;
  int64_t step_;
  Tell tell_;
  std::set<std::string> told_;
  RunPage page_;
  Json first_pictures_;  ///< of estimates
  MetricsFile metrics_;
  std::chrono::steady_clock::time_point page_written_ = {};
};

#ifdef HEADROOM_TRAINING_HERE
namespace detail {

inline std::vector<std::pair<std::string, std::string>> page_facts(const Config& config) {
  const TrainingConfig& training = config.training;
  const double seconds = static_cast<double>(training.segment_length) / static_cast<double>(config.audio.sample_rate);
  return {{"model", config.model.type()},
          {"stems", core::word_list(config.audio.stems)},
          {"step", std::to_string(training.batch_size) + " x " + std::to_string(training.gradient_accumulation_steps) +
                       " segments of " + short_number(seconds) + " s"},
          {"best by", core::metric_name(training.best_metric).name.data()}};
}

inline std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", ::gmtime_r(&now, &parts));
  return text;
}

/// The first pictures of estimates that a run has left in its folder; nothing where there are none of so many stems.
inline Json first_pictures(const std::filesystem::path& path, std::size_t stems) {
  if (!std::filesystem::exists(path)) return {};
  const io::InputFile file(path, {"headroom.training.metrics", "pictures", "spectrograms.json of a run"}, 64 << 20);
  const Json pictures = try_parse_json(file.read(0, file.size()));
  const Json first = pictures.is_object() ? pictures.value("first", Json()) : Json();
  const bool fits = first.is_object() && first.contains("step") && first["step"].is_number_integer() &&
                    first.contains("estimates") && first["estimates"].size() == stems &&
                    std::ranges::all_of(first["estimates"], [](const Json& picture) { return picture.is_string(); });
  return fits ? first : Json();
}

}  // namespace detail

HEADROOM_TRAINING RunRecord::RunRecord(std::filesystem::path folder, const Config& config, int64_t step, Tell tell)
    : folder_(std::move(folder)),
      config_(config),
      step_(step),
      tell_(std::move(tell)),
      page_("Training in " + folder_.filename().string(), detail::page_facts(config)),
      first_pictures_(step > 0 ? detail::first_pictures(folder_ / "spectrograms.json", config.audio.stems.size())
                               : Json()),
      metrics_(folder_ / "metrics.jsonl", step, [this](const Json& line) { page_.add(line); }) {}

HEADROOM_TRAINING void RunRecord::step(const StepReport& report) {
  step_ = report.step;
  if (step_ % config_.training.log_every == 0) append(step_line(report));
  const bool waited = std::chrono::steady_clock::now() - page_written_ > std::chrono::minutes(1);
  if (waited || report.epoch_step == report.steps_per_epoch) {
    write_page("step " + std::to_string(step_) + ", epoch " + std::to_string(report.epoch), true);
  }
}

HEADROOM_TRAINING void RunRecord::validation(const Validation& validation, double seconds) {
  append(validation_line(step_, seconds, validation));
  write_page("step " + std::to_string(step_), true);
}

HEADROOM_TRAINING void RunRecord::excerpt(const Example& truth, const torch::Tensor& estimates) {
  const auto rate = static_cast<double>(config_.audio.sample_rate);
  const double scale = loudest(truth.mixture, rate);
  const Json now = {{"step", step_}, {"estimates", pictures_of(estimates, scale)}};
  if (first_pictures_.is_null()) first_pictures_ = now;
  const Json pictures = {{"seconds", static_cast<double>(truth.mixture.size(-1)) / rate},
                         {"highest", rate / 2},
                         {"stems", config_.audio.stems},
                         {"mixture", pictures_of(truth.mixture.unsqueeze(0), scale)[0]},
                         {"truth", pictures_of(truth.stems, scale)},
                         {"first", first_pictures_},
                         {"last", now}};
  page_.set_pictures(pictures);
  write("spectrograms.json", pictures.dump());
}

HEADROOM_TRAINING void RunRecord::excerpt(const models::Separator& model, const BatchSource& source) {
  detail::play_segments(model, source, 1).separate([&](const Example& truth, const torch::Tensor& estimates) {
    excerpt(truth, estimates);
  });
}

HEADROOM_TRAINING void RunRecord::append(Json line) {
  using Seconds = std::chrono::duration<double>;
  line["time"] = Seconds(std::chrono::system_clock::now().time_since_epoch()).count();
  if (const std::string reason = metrics_.append(line); !reason.empty()) {
    tell("cannot write " + (folder_ / "metrics.jsonl").string() + ": " + reason + "; lines of it will be missing");
  }
  page_.add(line);
}

HEADROOM_TRAINING void RunRecord::write(const char* name, const std::string& text) {
  try {
    io::write_file(folder_ / name, "headroom.training.metrics", {text});
  } catch (const Error& error) {
    tell(error.what());
  }
}

HEADROOM_TRAINING void RunRecord::write_page(const std::string& state, bool running) {
  page_written_ = std::chrono::steady_clock::now();
  const int64_t steps = config_.training.epochs * config_.training.steps_per_epoch;
  write("report.html", page_.html(state + (running ? ", of " + std::to_string(steps) + " steps" : "") + "; written " +
                                      detail::utc_now(),
                                  running));
}

HEADROOM_TRAINING Json RunRecord::pictures_of(const torch::Tensor& recordings, double loudest) const {
  Json addresses = Json::array();
  for (const torch::Tensor& recording : recordings.unbind()) {
    const auto rate = static_cast<double>(config_.audio.sample_rate);
    addresses.push_back(image_address(spectrogram(recording, rate, loudest)));
  }
  return addresses;
}
#endif

}  // namespace headroom::inline v0::training
