#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "headroom/io/line_file.hpp"
#include "headroom/memory/phase_meter.hpp"
#include "headroom/training/json.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/score_json.hpp"
#include "headroom/training/validation.hpp"

// What a run tells about itself, as JSON lines: docs/070_training.md has the schema.

namespace headroom::inline v0::training {

/// Phases by name, in their order.
inline Json phases_json(const std::vector<PhaseUse>& phases) {
  Json json = Json::object();
  for (const PhaseUse& use : phases) json[use.name] = {{"seconds", use.seconds}, {"peak_bytes", use.peak_bytes}};
  return json;
}

/// The line of a step.
inline Json step_line(const StepReport& report) {
  const auto data = std::ranges::find(report.phases, "data", &PhaseUse::name);
  return {{"kind", "step"},
          {"step", report.step},
          {"epoch", report.epoch},
          {"loss", report.step_loss},
          {"learning_rate", report.learning_rate},
          {"gradient_norm", report.gradient_norm ? Json(*report.gradient_norm) : Json(nullptr)},
          {"examples", report.examples},
          {"seconds", report.seconds},
          {"data_seconds", data == report.phases.end() ? 0.0 : data->seconds},
          {"live_bytes", report.live_bytes},
          {"peak_bytes", report.peak_bytes},
          {"microbatch", report.microbatch},
          {"phases", phases_json(report.phases)}};
}

/// The line of a validation that took `seconds` after step number `step`.
inline Json validation_line(int64_t step, double seconds, const Validation& validation) {
  Json scores = Json::object();
  for (const auto& [metric, row] : validation.scores) scores[metric] = score_json(validation.stems, row);
  return {{"kind", "validation"}, {"step", step}, {"seconds", seconds}, {"scores", scores}};
}

/// metrics.jsonl of a run, which has each step and each validation once, in order, however often the run was resumed.
class MetricsFile {
 public:
  using OnLine = std::function<void(const Json& line)>;

  /// Goes on from step number `step`: lines of later steps are cut off, those that stay are given to `on_line`. Throws
  /// headroom.training.metrics when it cannot be written.
  MetricsFile(const std::filesystem::path& path, int64_t step, const OnLine& on_line)
      : file_(path, "headroom.training.metrics", [&](const std::string& text) {
          const Json line = try_parse_json(text);
          const bool stays = line.is_object() && line.contains("kind") && line.contains("step") &&
                             line["kind"].is_string() && line["step"].is_number_integer() && line["step"] <= step;
          if (stays) {
            last_step_[line["kind"]] = line["step"];
            on_line(line);
          }
          return stays;
        }) {}

  /// Appends a line, unless there is one of its kind and step already. Says why that was not possible, or nothing.
  std::string append(const Json& line) {
    const int64_t step = line["step"];
    const auto last = last_step_.find(line["kind"].get<std::string>());
    if (last != last_step_.end() && last->second >= step) return "";
    const std::string reason = file_.append(line.dump());
    if (reason.empty()) last_step_[line["kind"]] = step;
    return reason;
  }

 private:
  std::map<std::string, int64_t> last_step_;  ///< by kind; before file_, whose opening fills it
  io::LineFile file_;
};

}  // namespace headroom::inline v0::training
