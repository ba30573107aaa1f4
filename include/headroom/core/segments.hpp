#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <optional>

#include "headroom/core/error.hpp"
#include "headroom/core/segment_window.hpp"

namespace headroom::inline v0::core {

/// What stands in front of the first sample and behind the last one.
enum class Borders {
  none,     ///< nothing: the first and last samples have one segment's estimate
  reflect,  ///< length - step samples, mirrored: the first and last samples get as many segments as those in the middle
};

/// What a last segment holds that the recording does not fill.
enum class Tail {
  zero,       ///< silence behind the end
  reflect,    ///< the recording mirrored at its last sample, which is not repeated
  move_back,  ///< nothing: it ends with the recording. A recording shorter than a segment is mirrored
  centre,     ///< as much of the recording before it as silence behind the end, and so for each segment that reaches
              ///< beyond the end, also those that hold no new sample
};

/// How a recording is cut into segments that overlap, and put together again. Lengths are in samples.
struct Segments {
  Eigen::Index length = 0;                ///< what the model works on, best what it was trained with
  double overlap = 0.25;                  ///< share of a segment that the next one covers again, in [0, 1)
  std::optional<Eigen::Index> step = {};  ///< from one start to the next; set, it is used instead of `overlap`
  SegmentWindow window = SegmentWindow::triangle();
  Borders borders = Borders::none;
  Tail tail = Tail::reflect;
  Eigen::Index lead = 0;  ///< silence in front of the recording that is taken off the result: moves where it is cut
};

/// The step that `segments` stand for: `step`, or round(length·(1 - overlap)) and at least 1.
/// Throws `headroom.core.segments.options`.
inline Eigen::Index segment_step(const Segments& segments) {
  constexpr auto id = "headroom.core.segments.options";
  require(segments.length > 0, id, "the length of a segment is ", segments.length, ", expected at least 1 sample");
  require(segments.overlap >= 0 && segments.overlap < 1, id, "overlap is ", segments.overlap,
          ", expected a share of a segment in [0, 1), e.g. 0.25");
  require(segments.lead >= 0, id, "lead is ", segments.lead, ", expected at least 0 samples");
  const auto from_overlap =
      static_cast<Eigen::Index>(std::llround(static_cast<double>(segments.length) * (1 - segments.overlap)));
  const Eigen::Index step = segments.step.value_or(std::max<Eigen::Index>(1, from_overlap));
  require(step >= 1 && step <= segments.length, id, "step is ", step, ", expected 1 to the segment of ",
          segments.length, " samples: a longer step would leave samples out");
  return step;
}

namespace detail {

/// `length` / `num_overlap`. Throws `headroom.core.segments.options`.
inline Eigen::Index step_of_overlaps(Eigen::Index length, Eigen::Index num_overlap) {
  require(num_overlap >= 1 && num_overlap <= length, "headroom.core.segments.options", "num_overlap is ", num_overlap,
          ", expected 1 to the segment of ", length, " samples");
  return length / num_overlap;
}

}  // namespace detail

/// As Music-Source-Separation-Training cuts and blends: `num_overlap` segments over each sample, mirrored borders, a
/// linear fade over a tenth of a segment. The same results, but for what is a defect there: in a batch of several
/// segments it gives all of them the window of the first or last one, recordings of at most 2·(length - step) samples
/// have no borders there, and with one segment over each sample the first and last sample of each are lost.
/// Throws `headroom.core.segments.options`.
inline Segments like_msst(Eigen::Index length, Eigen::Index num_overlap) {
  return {.length = length,
          .step = detail::step_of_overlaps(length, num_overlap),
          .window = SegmentWindow::trapezoid(length / 10),
          .borders = Borders::reflect};
}

/// As demucs' apply_model does for models that it gives segments of one length (HTDemucs).
/// Throws `headroom.core.segments.options`.
inline Segments like_demucs(Eigen::Index length, double overlap = 0.25, double transition_power = 1) {
  const auto step = static_cast<Eigen::Index>((1 - overlap) * static_cast<double>(length));
  return {.length = length,
          .overlap = overlap,
          .step = std::max<Eigen::Index>(1, step),
          .window = SegmentWindow::triangle(transition_power),
          .tail = Tail::centre};
}

/// As audio-separator does for RoFormers: `num_overlap` segments over each sample, a Hamming window, the last segment
/// moved back to the end. To a recording shorter than a segment audio-separator gives the model just that; here its
/// mirror image fills the segment. Throws `headroom.core.segments.options`.
inline Segments like_audio_separator(Eigen::Index length, Eigen::Index num_overlap = 8) {
  return {.length = length,
          .step = detail::step_of_overlaps(length, num_overlap),
          .window = SegmentWindow::hamming(),
          .tail = Tail::move_back};
}

}  // namespace headroom::inline v0::core
