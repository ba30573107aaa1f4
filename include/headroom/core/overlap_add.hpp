#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <optional>
#include <utility>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::core {

/// What stands behind the end of the recording in a last segment that it does not fill.
enum class TailPadding {
  zero,     ///< silence
  reflect,  ///< the last segment's samples mirrored at the last one (which is not repeated), as often as needed
};

/// How a recording is cut into overlapping segments and put together again. All lengths are in samples.
struct OverlapAddOptions {
  Eigen::Index segment = 0;  ///< length the model works on
  double overlap = 0.25;     ///< share of a segment that the next one covers again, in [0, 1)
  std::optional<Eigen::Index> step =
      {};  ///< from one segment's start to the next; set, it is used instead of `overlap`
  std::optional<Eigen::Index> fade = {};  ///< linear fade at both ends; default segment / 2: a triangle. 0: no fade
  TailPadding padding = TailPadding::zero;
  Eigen::Index in_channels = 2;   ///< rows of the recording
  Eigen::Index out_channels = 2;  ///< rows of the result, e.g. stems x channels
};

/// The step that `options` stand for: `step`, or round(segment·(1 - overlap)) and at least 1.
/// Throws `headroom.core.overlap_add.options`.
inline Eigen::Index overlap_add_step(const OverlapAddOptions& options) {
  constexpr auto id = "headroom.core.overlap_add.options";
  require(options.segment > 0, id, "segment is ", options.segment, ", expected at least 1 sample");
  require(options.overlap >= 0 && options.overlap < 1, id, "overlap is ", options.overlap,
          ", expected a share of a segment in [0, 1), e.g. 0.25");
  const auto from_overlap =
      static_cast<Eigen::Index>(std::llround(static_cast<double>(options.segment) * (1 - options.overlap)));
  const Eigen::Index step = options.step.value_or(std::max<Eigen::Index>(1, from_overlap));
  require(step >= 1 && step <= options.segment, id, "step is ", step, ", expected 1 to the segment of ",
          options.segment, " samples: a longer step would leave samples out");
  return step;
}

/// Streaming overlap-add: cuts a recording of any length, pushed in blocks of any size, into overlapping segments,
/// gives each to a model, and blends the results. Nothing depends on the recording's length: all memory is
/// allocated by the constructor, `state_bytes` of it.
///
/// Segment k covers the samples [k·step, k·step + segment). A finished sample is Σ w·y / Σ w over the segments that
/// cover it, with the trapezoid w[i] = min(1, (i+1)/(fade+1), (segment-i)/(fade+1)). Every weight is positive, so the
/// division is safe, and a model that returns its input reproduces the recording up to rounding. With fade =
/// segment/2 this is demucs' triangular weight, with segment/10 the fade of Music-Source-Separation-Training.
///
///   OverlapAdd<float> blend({.segment = 441000}, model, sink);
///   while (...) blend.push(block);   // [in_channels, any]
///   blend.finish();
template <class Scalar>
class OverlapAdd {
 public:
  using Block = Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using ConstBlockRef = Eigen::Ref<const Block>;
  using BlockRef = Eigen::Ref<Block>;
  /// Reads [in_channels, segment] and writes every element of [out_channels, segment]. Both are contiguous.
  using Model = std::function<void(const ConstBlockRef& input, BlockRef output)>;
  /// Takes finished samples [out_channels, n], in order, each once, in total as many as were pushed.
  using Sink = std::function<void(const ConstBlockRef& finished)>;

  /// Throws `headroom.core.overlap_add.options`.
  OverlapAdd(const OverlapAddOptions& options, Model model, Sink sink)
      : step_(overlap_add_step(options)), padding_(options.padding), model_(std::move(model)), sink_(std::move(sink)) {
    constexpr auto id = "headroom.core.overlap_add.options";
    const Eigen::Index segment = options.segment, fade = options.fade.value_or(segment / 2);
    require(fade >= 0 && fade <= segment / 2, id, "fade is ", fade, ", expected 0 to half the segment of ", segment,
            " samples");
    require(options.in_channels > 0 && options.out_channels > 0, id, "got ", options.in_channels, " input and ",
            options.out_channels, " output channels, expected at least 1 of each");
    window_.resize(1, segment);
    for (Eigen::Index i = 0; i < segment; ++i) {
      const auto rise = static_cast<Scalar>(std::min(i + 1, segment - i)) / static_cast<Scalar>(fade + 1);
      window_(i) = std::min(Scalar(1), rise);
    }
    input_.resize(options.in_channels, segment);
    output_.resize(options.out_channels, segment);
    sum_.resize(options.out_channels, segment);
    weight_.resize(1, segment);
    reset();
  }

  /// Bytes of all buffers: the input segment, the model's output, its weighted sum, the window and the sum of weights.
  static std::size_t state_bytes(const OverlapAddOptions& options) {
    return sizeof(Scalar) * static_cast<std::size_t>(options.segment) *
           static_cast<std::size_t>(options.in_channels + 2 * options.out_channels + 2);
  }

  Eigen::Index segment() const { return input_.cols(); }
  Eigen::Index step() const { return step_; }

  /// Takes the next samples [in_channels, n], n >= 0; runs the model for each segment that they complete.
  /// After an exception from the model or the sink call `reset()` before the next recording.
  /// Throws `headroom.core.overlap_add.channels`.
  void push(const ConstBlockRef& samples) {
    require(samples.rows() == input_.rows(), "headroom.core.overlap_add.channels", "got a block of ", samples.rows(),
            " channels, expected ", input_.rows());
    for (Eigen::Index taken = 0; taken < samples.cols();) {
      const Eigen::Index n = std::min(samples.cols() - taken, segment() - filled_);
      input_.middleCols(filled_, n) = samples.middleCols(taken, n);
      taken += n;
      filled_ += n;
      if (filled_ == segment()) {
        run();
        emit(step_);
        advance();
      }
    }
  }

  /// Ends the recording: pads and runs the last segment if it has samples that no segment covered yet, hands out what
  /// remains, and is ready for the next recording.
  void finish() {
    if (filled_ > covered_) {
      pad();
      run();
    }
    if (filled_ > 0) {
      emit(filled_);
    }
    reset();
  }

  /// Forgets the recording in progress.
  void reset() {
    filled_ = covered_ = 0;
    sum_.setZero();
    weight_.setZero();
  }

 private:
  void run() {
    model_(input_, output_);
    sum_ += output_.rowwise() * window_.row(0);
    weight_ += window_;
  }

  void emit(Eigen::Index n) {
    auto finished = sum_.leftCols(n);
    finished.rowwise() /= weight_.row(0).head(n);
    sink_(finished);
  }

  void advance() {
    shift(input_);
    shift(sum_);
    shift(weight_);
    sum_.rightCols(step_).setZero();
    weight_.rightCols(step_).setZero();
    filled_ = covered_ = segment() - step_;
  }

  void shift(Block& rows) const {
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      Scalar* row = &rows(r, 0);
      std::copy(row + step_, row + rows.cols(), row);
    }
  }

  void pad() {
    const Eigen::Index missing = segment() - filled_;
    if (padding_ == TailPadding::zero) {
      input_.rightCols(missing).setZero();
      return;
    }
    const Eigen::Index period = std::max<Eigen::Index>(1, 2 * (filled_ - 1));
    for (Eigen::Index i = filled_; i < segment(); ++i) {
      input_.col(i) = input_.col(std::min(i % period, period - i % period) % filled_);
    }
  }

  Eigen::Index step_;
  TailPadding padding_;
  Model model_;
  Sink sink_;
  Block input_;            ///< [in_channels, segment], the first `filled_` columns hold samples
  Block output_, sum_;     ///< [out_channels, segment]
  Block window_, weight_;  ///< [1, segment]
  Eigen::Index filled_ = 0;
  Eigen::Index covered_ = 0;  ///< leading columns that the previous segment covered
};

}  // namespace headroom::inline v0::core
