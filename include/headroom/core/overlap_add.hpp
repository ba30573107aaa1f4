#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/segments.hpp"

namespace headroom::inline v0::core {

/// What OverlapAdd works on.
struct OverlapAddOptions {
  Segments segments;
  Eigen::Index batch = 1;         ///< segments in one call of the model; the result is the same for any
  Eigen::Index in_channels = 2;   ///< rows of the recording
  Eigen::Index out_channels = 2;  ///< rows of the result, e.g. stems x channels
};

/// Streaming overlap-add: cuts a recording of any length, pushed in blocks of any size, into overlapping segments,
/// gives them to a model, and blends the results. Nothing depends on the recording's length: all memory is allocated by
/// the constructor, `state_bytes` of it.
///
/// Segment k covers the samples [k·step, k·step + length), behind a border where there is one. A finished sample is
/// Σ w·y / Σ w over the segments that cover it. No weight is 0, so the division is safe, and a model that returns its
/// input reproduces the recording up to rounding.
///
///   OverlapAdd<float> blend({.segments = {.length = 441000}}, model, sink);
///   while (...) blend.push(block);   // [in_channels, any]
///   blend.finish();
template <class Scalar>
class OverlapAdd {
 public:
  using Block = Eigen::Array<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using ConstBlockRef = Eigen::Ref<const Block>;
  using BlockRef = Eigen::Ref<Block>;
  /// Reads n segments [n·in_channels, length] and writes every element of [n·out_channels, length], 1 <= n <= batch.
  /// Both are contiguous.
  using Model = std::function<void(const ConstBlockRef& input, BlockRef output)>;
  /// Takes finished samples [out_channels, n], in order, each once, in total as many as were pushed.
  using Sink = std::function<void(const ConstBlockRef& finished)>;

  /// Throws `headroom.core.segments.options` and `headroom.core.overlap_add.options`.
  OverlapAdd(const OverlapAddOptions& options, Model model, Sink sink)
      : sizes_(options),
        lead_(options.segments.lead),
        tail_(options.segments.tail),
        model_(std::move(model)),
        sink_(std::move(sink)) {
    window_ = options.segments.window.template weights<Scalar>(sizes_.length);
    input_.resize(sizes_.in, sizes_.held);
    segments_.resize(sizes_.batch * sizes_.in, sizes_.length);
    output_.resize(sizes_.batch * sizes_.out, sizes_.length);
    sum_.resize(sizes_.out, sizes_.blended);
    weight_.resize(1, sizes_.blended);
    placed_.reserve(static_cast<std::size_t>(sizes_.batch));
    reset();
  }

  /// Bytes of all buffers: the recording where it is cut, a batch of segments and of the model's outputs, their
  /// weighted sum and the sum of weights, and the window. Throws like the constructor.
  static std::size_t state_bytes(const OverlapAddOptions& options) {
    const Sizes sizes(options);
    return sizeof(Scalar) *
           static_cast<std::size_t>(sizes.in * sizes.held + sizes.batch * (sizes.in + sizes.out) * sizes.length +
                                    (sizes.out + 1) * sizes.blended + sizes.length);
  }

  /// Never more samples than this are pushed and not handed out yet. Throws like the constructor.
  static Eigen::Index latency(const OverlapAddOptions& options) {
    const Sizes sizes(options);
    return sizes.length + sizes.batch * sizes.step;
  }

  Eigen::Index length() const { return sizes_.length; }
  Eigen::Index step() const { return sizes_.step; }

  /// Takes the next samples [in_channels, n], n >= 0; runs the model for each batch of segments that they complete.
  /// After an exception from the model or the sink call `reset()` before the next recording.
  /// Throws `headroom.core.overlap_add.channels`.
  void push(const ConstBlockRef& samples) {
    require(samples.rows() == sizes_.in, "headroom.core.overlap_add.channels", "got a block of ", samples.rows(),
            " channels, expected ", sizes_.in);
    if (pushed_ == 0 && samples.cols() > 0) append(lead_, [](BlockRef to, Eigen::Index) { to.setZero(); });
    pushed_ += samples.cols();
    append(samples.cols(), [&](BlockRef to, Eigen::Index from) { to = samples.middleCols(from, to.cols()); });
  }

  /// Ends the recording: runs what its last samples need, hands out what remains, and is ready for the next one.
  void finish() {
    if (pushed_ > 0) {
      if (in_head_) reflect_head();
      append_mirrored(sizes_.border);
      run_tail();
      if (!placed_.empty()) run();
      emit(end_);
    }
    reset();
  }

  /// Forgets the recording in progress.
  void reset() {
    origin_ = next_ = done_ = pushed_ = 0;
    end_ = sizes_.border;
    in_head_ = sizes_.border > 0;
    placed_.clear();
    sum_.setZero();
    weight_.setZero();
  }

 private:
  struct Sizes {
    explicit Sizes(const OverlapAddOptions& options)
        : length(options.segments.length),
          step(segment_step(options.segments)),
          border(options.segments.borders == Borders::reflect ? length - step : 0),
          hold(options.segments.tail == Tail::move_back ? step : 0),
          held(length + step + border),
          blended(length + hold),
          batch(options.batch),
          in(options.in_channels),
          out(options.out_channels) {
      require(in > 0 && out > 0 && batch > 0, "headroom.core.overlap_add.options", "got ", in, " input and ", out,
              " output channels, a batch of ", batch, ", expected at least 1 of each");
    }
    Eigen::Index length, step, border;
    Eigen::Index hold;           ///< a segment that is moved back may begin so much earlier than the next one would
    Eigen::Index held, blended;  ///< columns of the recording and of the sums
    Eigen::Index batch, in, out;
  };

  /// A segment in the batch. Positions count from the begin of the border in front, if there is one.
  struct Placed {
    Eigen::Index at;      ///< position of the first sample of the result that it covers
    Eigen::Index skip;    ///< samples of the model's output in front of it
    Eigen::Index length;  ///< samples that it covers
  };

  /// Appends `count` samples that `write` puts into the columns given; it is told how many came before them.
  template <class Write>
  void append(Eigen::Index count, Write&& write) {
    for (Eigen::Index taken = 0; taken < count;) {
      const Eigen::Index filled = end_ - origin_, n = std::min(count - taken, sizes_.held - filled);
      write(input_.middleCols(filled, n), taken);
      taken += n;
      end_ += n;
      if (in_head_ && end_ > 2 * sizes_.border) reflect_head();
      if (!in_head_) place_complete();
    }
  }

  /// Appends `count` samples that mirror those before at the last one, as often as needed.
  void append_mirrored(Eigen::Index count) {
    const Eigen::Index last = end_ - 1, available = end_ - origin_;
    append(count, [&](BlockRef to, Eigen::Index from) {
      for (Eigen::Index i = 0; i < to.cols(); ++i) {
        to.col(i) = input_.col(last - folded(from + i + 1, available) - origin_);
      }
    });
  }

  /// Fills the border in front.
  void reflect_head() {
    in_head_ = false;
    const Eigen::Index border = sizes_.border;
    for (Eigen::Index i = 1; i <= border; ++i) {
      input_.col(border - i) = input_.col(border + folded(i, end_ - border));
    }
    place_complete();
  }

  /// How far a walk of `i` steps is from its start when it turns around at both ends of `length` samples.
  static Eigen::Index folded(Eigen::Index i, Eigen::Index length) {
    const Eigen::Index period = std::max<Eigen::Index>(1, 2 * (length - 1));
    return std::min(i % period, period - i % period) % length;
  }

  void place_complete() {
    while (end_ >= next_ + sizes_.length) {
      place(next_, {next_, 0, sizes_.length});
      next_ += sizes_.step;
      // What the next segments need, and one step more for those at the end.
      const Eigen::Index gone = next_ - sizes_.step - origin_;
      shift(input_, gone);
      origin_ += gone;
    }
  }

  void run_tail() {
    const Eigen::Index length = sizes_.length, covered = next_ == 0 ? 0 : next_ - sizes_.step + length;
    if (tail_ == Tail::centre) {
      for (; next_ < end_; next_ += sizes_.step) {
        const Eigen::Index before = (length - (end_ - next_)) / 2;
        place(next_ - before, {next_, before, end_ - next_});
      }
    } else if (end_ > covered) {
      const Eigen::Index missing = next_ + length - end_;
      if (tail_ == Tail::zero) {
        append(missing, [](BlockRef to, Eigen::Index) { to.setZero(); });
      } else if (tail_ == Tail::move_back && next_ > 0) {
        place(end_ - length, {end_ - length, 0, length});
      } else {
        append_mirrored(missing);
      }
    }
  }

  /// Puts the samples from position `from` on into the batch, silence where the recording has none.
  void place(Eigen::Index from, const Placed& placed) {
    auto segment = segments_.middleRows(static_cast<Eigen::Index>(placed_.size()) * sizes_.in, sizes_.in);
    const Eigen::Index first = std::max(from, origin_), n = std::min(from + sizes_.length, end_) - first;
    segment.setZero();
    segment.middleCols(first - from, n) = input_.middleCols(first - origin_, n);
    placed_.push_back(placed);
    if (static_cast<Eigen::Index>(placed_.size()) == sizes_.batch) run();
  }

  void run() {
    const auto count = static_cast<Eigen::Index>(placed_.size());
    model_(segments_.topRows(count * sizes_.in), output_.topRows(count * sizes_.out));
    for (Eigen::Index i = 0; i < count; ++i) {
      const auto [at, skip, length] = placed_[static_cast<std::size_t>(i)];
      const auto output = output_.block(i * sizes_.out, skip, sizes_.out, length);
      sum_.middleCols(at - done_, length) += output.rowwise() * window_.head(length);
      weight_.middleCols(at - done_, length) += window_.head(length);
      emit(std::min(at + sizes_.step - sizes_.hold, end_));
    }
    placed_.clear();
  }

  /// Hands out what is before `position`: no later segment covers it.
  void emit(Eigen::Index position) {
    const Eigen::Index begin = sizes_.border + lead_;  // the recording's first sample
    const Eigen::Index first = std::max(done_, begin), last = std::min(position, begin + pushed_);
    if (first < last) {
      auto finished = sum_.middleCols(first - done_, last - first);
      finished.rowwise() /= weight_.row(0).segment(first - done_, last - first);
      sink_(finished);
    }
    const Eigen::Index gone = position - done_;
    for (Block* sums : {&sum_, &weight_}) {
      shift(*sums, gone);
      sums->rightCols(gone).setZero();
    }
    done_ = position;
  }

  static void shift(Block& rows, Eigen::Index columns) {
    for (Eigen::Index r = 0; r < rows.rows(); ++r) {
      Scalar* row = &rows(r, 0);
      std::copy(row + columns, row + rows.cols(), row);
    }
  }

  Sizes sizes_;
  Eigen::Index lead_;
  Tail tail_;
  Model model_;
  Sink sink_;
  Block input_;                                     ///< [in, held]: the recording from `origin_` to `end_`
  Block segments_, output_;                         ///< [batch·in, length], [batch·out, length]
  Block sum_, weight_;                              ///< [out, blended], [1, blended]: from `done_` on
  Eigen::Array<Scalar, 1, Eigen::Dynamic> window_;  ///< [length]
  std::vector<Placed> placed_;                      ///< the batch's segments that are waiting
  Eigen::Index origin_, end_, next_, done_;         ///< positions; `next_`: of the next segment
  Eigen::Index pushed_ = 0;                         ///< samples of the recording
  bool in_head_ = false;                            ///< the border in front is not filled yet
};

}  // namespace headroom::inline v0::core
