#pragma once

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "command_line.hpp"
#include "progress.hpp"
#include "separation_inputs.hpp"

/// How far all recordings are: one line that is written over on a terminal, elsewhere a line every tenth of the way.
class SeparationProgress {
 public:
  explicit SeparationProgress(const std::vector<Track>& tracks) : tracks_(tracks.size()) {
    for (const Track& track : tracks) total_ += track.seconds;
  }

  void begin(const Track& track) {
    ++track_;
    track_done_ = 0;
    track_seconds_ = track.seconds;
    label_ = tracks_ == 1
                 ? ""
                 : std::to_string(track_) + "/" + std::to_string(tracks_) + " " + printable(track.name()) + ", ";
  }

  void show(std::int64_t done, std::int64_t frames) {
    track_done_ = track_seconds_ * static_cast<double>(done) / static_cast<double>(frames);
    const double so_far = finished_ + track_done_, share = so_far / total_;
    const bool last = done == frames && track_ == tracks_;
    if (!terminal_ && share < next_ && !last) return;
    next_ = share + 0.1;
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    std::cerr << (terminal_ ? "\r" : "") << label_ << static_cast<int>(100 * share) << "%, " << clock_time(elapsed)
              << " elapsed, " << clock_time(elapsed / share - elapsed) << " left"
              << (!terminal_ ? "\n"
                  : last     ? "\x1b[K\n"
                             : "\x1b[K")
              << std::flush;
    open_ = terminal_ && !last;
  }

  /// What a recording that failed would still have taken is no longer ahead.
  void end(bool whole) {
    const double done = whole ? track_seconds_ : track_done_;
    finished_ += done;
    total_ -= track_seconds_ - done;
  }

  /// Ends the line, so that something else can be printed.
  void close() {
    if (open_) std::cerr << '\n';
    open_ = false;
  }

 private:
  std::size_t tracks_, track_ = 0;
  std::string label_;
  double total_ = 0, finished_ = 0, track_seconds_ = 0, track_done_ = 0;  // seconds of sound
  bool terminal_ = isatty(STDERR_FILENO) != 0, open_ = false;
  double next_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};
