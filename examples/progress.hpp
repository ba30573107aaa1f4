#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "command_line.hpp"
#include "headroom/training/run.hpp"

/// 3 minutes and 7 seconds as "03:07", from an hour on as "1:03:07".
inline std::string clock_time(double seconds) {
  const auto total = static_cast<long>(std::max(0.0, seconds));
  char text[32];
  if (total < 3600) {
    std::snprintf(text, sizeof text, "%02ld:%02ld", total / 60, total % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", total / 3600, total / 60 % 60, total % 60);
  }
  return text;
}

/// The line of an epoch, in tqdm's form:
/// Epoch 1: 100%|██████████| 100/100 [10:23<00:00, loss=2.3456, lr=0.000300, mem=45.2/50.1GB]
/// The loss is the mean of the epoch so far; mem is what tensors hold now and their peak, in units of 2^30 bytes.
inline std::string progress_line(const headroom::training::StepReport& report) {
  constexpr int kWidth = 10;
  const double share = static_cast<double>(report.epoch_step) / static_cast<double>(report.steps_per_epoch);
  const double left = report.epoch_seconds / static_cast<double>(report.epoch_steps_in_run) *
                      static_cast<double>(report.steps_per_epoch - report.epoch_step);
  std::string bar;
  for (int cell = 0; cell < kWidth; ++cell) {
    bar += cell < static_cast<int>(share * kWidth) ? "█" : " ";
  }
  constexpr double kGiB = 1 << 30;
  char text[256];
  std::snprintf(text, sizeof text, "Epoch %lld: %3d%%|%s| %lld/%lld [%s<%s, loss=%.4f, lr=%.6f, mem=%.2f/%.2fGB]",
                static_cast<long long>(report.epoch), static_cast<int>(100 * share), bar.c_str(),
                static_cast<long long>(report.epoch_step), static_cast<long long>(report.steps_per_epoch),
                clock_time(report.epoch_seconds).c_str(), clock_time(left).c_str(), report.loss, report.learning_rate,
                static_cast<double>(report.live_bytes) / kGiB, static_cast<double>(report.peak_bytes) / kGiB);
  return text;
}

/// Shows the steps of each epoch: a line that is rewritten on a terminal, elsewhere a line for each epoch. Tells when
/// memory ran out, so that batches of `batch_size` go on in parts.
class ProgressBar {
 public:
  explicit ProgressBar(std::int64_t batch_size) : batch_size_(batch_size), part_(batch_size) {}

  void show(const headroom::training::StepReport& report) {
    if (report.microbatch != part_) {
      close();
      part_ = report.microbatch;
      std::printf("memory ran out: from step %lld on batches of %lld go in parts of %lld\n",
                  static_cast<long long>(report.step), static_cast<long long>(batch_size_),
                  static_cast<long long>(part_));
    }
    const bool done = report.epoch_step == report.steps_per_epoch;
    line_ = progress_line(report);
    open_ = !done;
    if (terminal_) {
      std::printf("\r%s\x1b[K%s", line_.c_str(), done ? "\n" : "");
    } else if (done) {
      std::printf("%s\n", line_.c_str());
    }
    std::fflush(stdout);
  }

  /// A line of its own.
  void note(const std::string& text) {
    close();
    std::printf("%s\n", printable(text).c_str());
    std::fflush(stdout);
  }

  /// Ends the line of an epoch that is not over.
  void close() {
    if (open_) {
      std::printf("%s\n", terminal_ ? "" : line_.c_str());
      std::fflush(stdout);
      open_ = false;
    }
  }

 private:
  std::int64_t batch_size_, part_;
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
  bool open_ = false;
  std::string line_;
};
