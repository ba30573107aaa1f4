#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "command_line.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/segment_window.hpp"
#include "headroom/core/segments.hpp"

/// How segments are cut, run and blended, as the command line asks for it.
struct BlendChoice {
  std::string like;    ///< whose tool's way, see core::like_msst and its neighbours; empty: this library's
  std::string window;  ///< empty: that of `like`
  std::optional<double> overlap;
  std::optional<std::int64_t> segment, step, num_overlap, batch;
  std::int64_t shifts = 0;
  bool augment = false, bf16 = false;
};

inline void add_blend_options(CommandLine& line, BlendChoice& choice) {
  constexpr std::int64_t kMost = 1'000'000'000;
  line.number("--segment", choice.segment, Bounds<std::int64_t>{1, kMost},
              "samples the model works on at a time; default: as configured");
  line.text("--like", choice.like, "cut and blend as this tool does: msst, demucs or audio-separator")
      .one_of({"msst", "demucs", "audio-separator"});
  const auto overlap = line.number("--overlap", choice.overlap, Bounds<double>{0, 0.999},
                                   "share of a segment that the next one covers again; default: as configured, 0.25");
  const auto step =
      line.number("--step", choice.step, Bounds<std::int64_t>{1, kMost}, "samples from one segment to the next");
  overlap.without(step);
  line.number("--num-overlap", choice.num_overlap, Bounds<std::int64_t>{1, kMost},
              "segments over each sample; default with --like msst 4, with audio-separator 8")
      .without(overlap)
      .without(step);
  line.text("--window", choice.window, "weights of a segment's samples: triangle, trapezoid, hamming or hann")
      .one_of({"triangle", "trapezoid", "hamming", "hann"});
  line.number("--shifts", choice.shifts, Bounds<std::int64_t>{0, 1000},
              "average over so many times, each with other silence in front");
  line.flag("--augment", choice.augment, "average with polarity flipped and with channels reversed: 3 times the work");
  line.number("--batch", choice.batch, Bounds<std::int64_t>{1, 4096},
              "segments in one call of the model; default: as configured, 1");
  line.flag("--bf16", choice.bf16, "the model computes in bfloat16 where that is safe");
}

/// `length` and `overlap` are those of the model's configuration. Throws headroom.separate.overlap.
inline headroom::core::Segments chosen_segments(const BlendChoice& choice, std::int64_t length, double overlap) {
  namespace core = headroom::core;
  using Window = core::SegmentWindow;
  length = choice.segment.value_or(length);
  headroom::require(choice.num_overlap.value_or(1) <= length, "headroom.separate.overlap", "--num-overlap ",
                    choice.num_overlap.value_or(1), " is more than the ", length,
                    " samples of a segment; give fewer, or a longer --segment");
  core::Segments segments = choice.like == "msst"     ? core::like_msst(length, choice.num_overlap.value_or(4))
                            : choice.like == "demucs" ? core::like_demucs(length, choice.overlap.value_or(0.25))
                            : choice.like == "audio-separator"
                                ? core::like_audio_separator(length, choice.num_overlap.value_or(8))
                                : core::Segments{.length = length, .overlap = overlap};
  if (choice.overlap && choice.like != "demucs") {  // demucs rounds a step down
    segments.overlap = *choice.overlap;
    segments.step.reset();
  }
  if (choice.num_overlap) segments.step = length / *choice.num_overlap;
  if (choice.step) segments.step = choice.step;
  const std::map<std::string, Window> windows = {{"triangle", Window::triangle()},
                                                 {"trapezoid", Window::trapezoid()},
                                                 {"hamming", Window::hamming()},
                                                 {"hann", Window::hann()}};
  if (!choice.window.empty()) segments.window = windows.at(choice.window);
  return segments;
}
