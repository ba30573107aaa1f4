#pragma once

#include <torch/types.h>
#include <torch/utils.h>

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/audio/level.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/test_time.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/lockstep.hpp"
#include "headroom/core/overlap_add.hpp"
#include "headroom/runtime/autocast_state.hpp"

namespace headroom::inline v0::audio {

/// How a recording is separated.
struct SeparatorOptions {
  core::Segments segments = {.length = 441000};  ///< how it is cut and blended; core::like_msst and others make some
  std::int64_t batch = 1;                        ///< segments in one call of the model
  std::int64_t channels = 2;                     ///< C
  std::int64_t stems = 4;                        ///< N
  TestTime test_time = {};                       ///< shifts and augmentation
  bool bf16 = false;                             ///< the model runs under bfloat16 autocast; its results become float
  torch::Device device = torch::kCPU;            ///< where the model is
  /// Of the recording, for a model of recordings with mean 0 and deviation 1: it gets (x - mean) / deviation, and each
  /// of its stems becomes deviation·stem + mean, as in demucs' programs and with `inference.normalize` in
  /// Music-Source-Separation-Training. Silence around the recording is 0 for the model. None: x as it is.
  std::optional<Level> level = {};
};

/// Samples of one recording or of all its stems, a channel a row.
using Samples = core::OverlapAdd<float>::Block;
using SamplesRef = core::OverlapAdd<float>::ConstBlockRef;

namespace detail {

/// The rows of `samples` [N·C,n] as stems [N,C,n], in place.
inline torch::Tensor stems_of(const SamplesRef& samples, std::int64_t stems, std::int64_t channels) {
  const std::int64_t stride = samples.outerStride();
  return torch::from_blob(const_cast<float*>(samples.data()), {stems, channels, samples.cols()},
                          {channels * stride, stride, 1}, torch::kFloat);
}

/// `model` on contiguous segments [B·C,S], its result in `output` [B·N·C,S].
inline void run_model(const SegmentModel& model, const SeparatorOptions& options, const SamplesRef& input,
                      core::OverlapAdd<float>::BlockRef output) {
  const torch::NoGradGuard no_grad;
  const std::int64_t C = options.channels, N = options.stems, S = input.cols(), B = input.rows() / C;
  const auto checked = [&](const torch::Tensor& segments) {
    std::optional<headroom::detail::AutocastGuard> autocast;
    if (options.bf16) autocast.emplace(options.device.type(), torch::kBFloat16);
    const torch::Tensor stems = model(segments);
    require(stems.sizes() == torch::IntArrayRef({B, N, C, S}), "headroom.audio.separator.model", "the model made ",
            stems.sizes(), " of ", torch::IntArrayRef({B, C, S}), ", expected ", torch::IntArrayRef({B, N, C, S}),
            "; options.stems, channels and segments.length have to be the model's");
    return stems.to(torch::kFloat);
  };
  const torch::Tensor held = torch::from_blob(const_cast<float*>(input.data()), {B, C, S}, torch::kFloat);
  // A copy, since a model may work in place.
  const torch::Tensor segments = held.to(options.device, torch::kFloat, /*non_blocking=*/false, /*copy=*/true);
  const torch::Tensor stems = options.test_time.augment ? augmented(checked, segments) : checked(segments);
  torch::from_blob(output.data(), {B, N, C, S}, torch::kFloat).copy_(stems);
}

}  // namespace detail

/// A recording that comes in blocks becomes stems that leave in blocks, in the memory of a batch of segments whatever
/// its length: core::OverlapAdd with a model, once for each shift.
class SeparatorStream {
 public:
  /// Takes finished samples [N·C,n], in order, in total as many as were pushed.
  using Sink = core::OverlapAdd<float>::Sink;

  /// Throws `headroom.audio.separator.options`, `headroom.core.segments.options`, `headroom.core.overlap_add.options`.
  SeparatorStream(SegmentModel model, const SeparatorOptions& options, Sink sink)
      : options_(options), model_(std::move(model)), sink_(at_level(std::move(sink), options.level)) {
    const std::vector<std::int64_t> shifts = detail::shift_lengths(options.test_time);
    const auto run = [this](const SamplesRef& input, core::OverlapAdd<float>::BlockRef output) {
      detail::run_model(model_, options_, input, output);
    };
    if (shifts.size() > 1) {
      mean_.emplace(rows_of(options), capacity_of(options),
                    [this](auto& streams, Eigen::Index n) { average(streams, n); });
    }
    for (std::size_t i = 0; i < shifts.size(); ++i) {
      core::OverlapAddOptions blend = blend_of(options);
      blend.segments.lead += shifts[i];
      blends_.emplace_back(
          blend, run, [this, i](const SamplesRef& finished) { mean_ ? mean_->add(i, finished) : sink_(finished); });
    }
  }
  SeparatorStream(const SeparatorStream&) = delete;
  SeparatorStream& operator=(const SeparatorStream&) = delete;

  /// Bytes of all buffers beside the model: core::OverlapAdd's for each shift, and what one shift is ahead of another.
  static std::size_t state_bytes(const SeparatorOptions& options) {
    const std::size_t shifts = rows_of(options).size();
    return shifts * core::OverlapAdd<float>::state_bytes(blend_of(options)) +
           (shifts > 1 ? core::Lockstep<float>::state_bytes(rows_of(options), capacity_of(options)) : 0);
  }

  /// Never more samples than this are pushed and not handed out yet.
  static std::int64_t latency(const SeparatorOptions& options) {
    return core::OverlapAdd<float>::latency(blend_of(options));
  }

  /// Takes the next samples [C,n]. Throws what the model and the sink throw.
  void push(const SamplesRef& samples) {
    for (Eigen::Index done = 0; done < samples.cols(); done += piece_of(options_)) {
      const Eigen::Index n = std::min(piece_of(options_), samples.cols() - done);
      const auto piece = samples.middleCols(done, n);
      if (const std::optional<Level>& level = options_.level) {
        push_piece((piece - static_cast<float>(level->mean)) / static_cast<float>(level->deviation));
      } else {
        push_piece(piece);
      }
    }
  }

  /// Ends the recording.
  void finish() {
    for (auto& blend : blends_) blend.finish();
  }

 private:
  static core::OverlapAddOptions blend_of(const SeparatorOptions& options) {
    require(options.channels > 0 && options.stems > 0 && options.batch > 0, "headroom.audio.separator.options", "got ",
            options.channels, " channels, ", options.stems, " stems and a batch of ", options.batch,
            ", expected at least 1 of each");
    return {.segments = options.segments,
            .batch = options.batch,
            .in_channels = options.channels,
            .out_channels = options.stems * options.channels};
  }
  static std::vector<Eigen::Index> rows_of(const SeparatorOptions& options) {
    return std::vector<Eigen::Index>(static_cast<std::size_t>(std::max<std::int64_t>(1, options.test_time.shifts)),
                                     options.stems * options.channels);
  }
  /// What is pushed into one shift before the next one gets it.
  static Eigen::Index piece_of(const SeparatorOptions& options) {
    return std::min<Eigen::Index>(options.segments.length, 1 << 16);
  }
  static Eigen::Index capacity_of(const SeparatorOptions& options) { return latency(options) + piece_of(options); }

  void push_piece(const SamplesRef& piece) {
    for (auto& blend : blends_) blend.push(piece);
  }

  /// A sink of stems with mean 0 and deviation 1 that hands them on at `level`.
  static Sink at_level(Sink sink, const std::optional<Level>& level) {
    if (!level) return sink;
    return [sink = std::move(sink), mean = static_cast<float>(level->mean),
            deviation = static_cast<float>(level->deviation)](const SamplesRef& finished) {
      sink(finished * deviation + mean);
    };
  }

  void average(std::vector<Samples>& streams, Eigen::Index n) {
    auto mean = streams.front().leftCols(n);
    for (std::size_t i = 1; i < streams.size(); ++i) mean += streams[i].leftCols(n);
    mean /= static_cast<float>(streams.size());
    sink_(mean);
  }

  SeparatorOptions options_;
  SegmentModel model_;
  Sink sink_;
  std::optional<core::Lockstep<float>> mean_;  ///< over the shifts
  std::deque<core::OverlapAdd<float>> blends_;
};

}  // namespace headroom::inline v0::audio
