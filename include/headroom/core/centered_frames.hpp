#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <utility>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::core {

/// What stands before the first and behind the last sample.
enum class FramePadding { mirrored, zeros };

/// Cuts signals that come in blocks into the frames of torch.stft(center=True): frame t is centred on sample t * hop,
/// and half a frame is added at both ends. What is kept is one frame.
class CenteredFrames {
 public:
  /// `length` of a frame is even. Throws headroom.core.frames.options.
  CenteredFrames(Eigen::Index rows, Eigen::Index length, Eigen::Index hop, FramePadding padding)
      : half_(length / 2), hop_(hop), padding_(padding) {
    require(rows >= 1 && length >= 2 && length % 2 == 0 && hop >= 1 && hop <= length / 2,
            "headroom.core.frames.options", "got ", rows, " signals, frames of ", length, " samples and a hop of ", hop,
            "; expected at least 1, an even length, and a hop of at most half of it");
    samples_ = Eigen::MatrixXd::Zero(length + 1, rows);
  }

  /// Adds a block [rows, samples] of any length; `on_frame` gets each frame that is complete, [length, rows].
  /// Throws headroom.core.frames.shape.
  template <class Block, class F>
  void add(const Eigen::MatrixBase<Block>& block, F&& on_frame) {
    require(block.rows() == samples_.cols(), "headroom.core.frames.shape", "got ", block.rows(), " signals, expected ",
            samples_.cols());
    for (Eigen::Index done = 0; done < block.cols();) {
      const Eigen::Index count = std::min(block.cols() - done, samples_.rows() - filled_);
      samples_.middleRows(filled_, count) = block.middleCols(done, count).transpose().template cast<double>();
      filled_ += count;
      done += count;
      if (filled_ == samples_.rows()) take_frame(on_frame);
    }
    total_ += block.cols();
  }

  /// The last frames. Throws headroom.core.frames.length where the signals are too short to be mirrored.
  template <class F>
  void finish(F&& on_frame) {
    const bool mirrored = padding_ == FramePadding::mirrored;
    require(!mirrored || total_ > half_, "headroom.core.frames.length", "a signal of ", total_,
            " samples is too short to be mirrored at its ends; expected more than ", half_);
    Eigen::MatrixXd end = Eigen::MatrixXd::Zero(samples_.cols(), half_);
    if (mirrored) end = samples_.middleRows(filled_ - 1 - half_, half_).colwise().reverse().transpose();
    add(end, on_frame);
    if (filled_ == samples_.rows() - 1) take_frame(on_frame);
  }

 private:
  /// A frame is taken when one sample more than it needs is there: the first is mirrored from that one on.
  template <class F>
  void take_frame(F&& on_frame) {
    if (std::exchange(is_first_, false) && padding_ == FramePadding::mirrored) {
      samples_.topRows(half_) = samples_.middleRows(half_ + 1, half_).colwise().reverse().eval();
    }
    on_frame(Eigen::MatrixXd(samples_.topRows(2 * half_)));
    const Eigen::MatrixXd kept = samples_.middleRows(hop_, filled_ - hop_);
    samples_.topRows(kept.rows()) = kept;
    filled_ -= hop_;
  }

  Eigen::Index half_, hop_;
  FramePadding padding_;
  Eigen::MatrixXd samples_;  // [length + 1, rows]
  Eigen::Index filled_ = half_, total_ = 0;
  bool is_first_ = true;
};

}  // namespace headroom::inline v0::core
