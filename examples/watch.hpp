#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <iostream>
#include <optional>
#include <string>

#include "command_line.hpp"
#include "headroom/core/score_rows.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/run.hpp"
#include "headroom/training/run_record.hpp"
#include "headroom/training/split.hpp"
#include "headroom/training/split_validation.hpp"
#include "headroom/training/validation.hpp"
#include "progress.hpp"

/// Shows how a run goes on and keeps its record: the progress line, scores of each validation, metrics.jsonl and the
/// page in the folder of the run.
class Watch {
 public:
  /// `valid`: what the model is validated on, if anything; `step`: that the run begins after.
  Watch(const std::filesystem::path& folder, const headroom::training::Config& config,
        const headroom::models::Separator& model, const std::optional<headroom::training::Split>& valid, int64_t step)
      : config_(config),
        model_(model),
        valid_(valid),
        bar_(config.training.batch_size),
        record_(folder, config, step, [this](const std::string& problem) { bar_.note("record:   " + problem); }) {
    if (valid_) record_.excerpt(model_, std::cref(*valid_));
  }

  /// Lets a run tell how it goes on.
  void attach(headroom::training::RunOptions& options) {
    options.on_step = [this](const headroom::training::StepReport& report) {
      record_.step(report);
      bar_.show(report);
    };
    options.on_notice = [this](const std::string& text) { bar_.note(text); };
    if (valid_) options.validate = [this] { return validate(); };
  }

  /// Of a run that came to an end: why, and what its phases needed.
  void end(const headroom::training::Summary& summary) {
    bar_.close();
    if (summary.out_of_patience) {
      std::cout << "ended early: " << config_.training.patience << " validations in a row were no better than "
                << summary.best_score << "\n";
    }
    std::string phases;
    for (const headroom::PhaseUse& use : summary.phases) {
      phases += (phases.empty() ? "" : ", ") + use.name + " " + headroom::format_bytes(use.peak_bytes);
    }
    if (!phases.empty()) std::cout << "memory:   highest in " << phases << std::endl;
    record_.end("step " + std::to_string(summary.steps) + ": " +
                (summary.stopped           ? "stopped"
                 : summary.out_of_patience ? "ended early, no validation was better"
                                           : "ended"));
  }

  /// Of one that an error ended.
  void end(const std::string& error) {
    bar_.close();
    record_.end("ended by an error: " + error);
  }

 private:
  double validate() {
    bar_.close();
    const auto start = std::chrono::steady_clock::now();
    const headroom::training::Validation validation = headroom::training::validate(model_, *valid_, config_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    for (const auto& [metric, row] : validation.scores) print(metric, row);
    record_.excerpt(model_, std::cref(*valid_));
    record_.validation(validation, seconds.count());
    return validation.mean(config_.training.best_metric);
  }

  /// "validation nSDR 3.21 dB: vocals 2.10, drums 4.50, bass -".
  void print(const std::string& metric, const headroom::core::ScoreRow& row) const {
    const auto text = [](const std::optional<double>& value) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.2f", value.value_or(0));
      return value ? std::string(digits) : "-";
    };
    const headroom::core::MetricName& name = headroom::core::metric_name(metric);
    std::cout << "validation " << name.name << " " << text(row.back()) << (name.unit.empty() ? "" : " ") << name.unit;
    for (std::size_t stem = 0; stem + 1 < row.size(); ++stem) {
      std::cout << (stem == 0 ? ": " : ", ") << printable(config_.audio.stems[stem]) << " " << text(row[stem]);
    }
    std::cout << std::endl;
  }

  const headroom::training::Config& config_;
  headroom::models::Separator model_;
  const std::optional<headroom::training::Split>& valid_;
  ProgressBar bar_;
  headroom::training::RunRecord record_;
};
