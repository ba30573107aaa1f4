#pragma once

#include <soxr.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// How many samples `frames` at `from` Hz are at `to` Hz: ceil(frames·to/from), the instants k/to before the end
/// frames/from. From there and back are never fewer than there were.
inline std::int64_t resampled_length(std::int64_t frames, int from, int to) {
  return frames / from * to + (frames % from * to + from - 1) / from;
}

namespace detail {

/// How many samples at `from` Hz become no more than about `count` at `to` Hz: what is resampled at once.
inline std::int64_t frames_at_once(std::int64_t count, int from, int to) {
  return std::clamp<std::int64_t>(count * from / to, 1, count);
}

}  // namespace detail

/// Converts a stream from one sample rate to another with libsoxr's recipe for very high quality: 28 bits, linear
/// phase, flat to 0.91 of the lower Nyquist frequency. Sample k of the result is the sound at k/to seconds: there is no
/// delay, and behind the end there is silence. Memory is that of the filters and a block, whatever the length. How a
/// stream is cut into blocks changes no bit.
///
///   Resampler to_model(2, 48000, 44100);
///   while (...) use(to_model.push(block));  // [C,any] -> [C,what is ready]
///   use(to_model.finish());                 // in total resampled_length of what was pushed
class Resampler {
 public:
  /// Throws `headroom.audio.resampler.options`: fewer than 1 channel or 1 Hz, or a ratio beyond 1000.
  Resampler(std::int64_t channels, int from, int to) : channels_(channels), from_(from), to_(to) {
    constexpr auto id = "headroom.audio.resampler.options";
    require(channels >= 1 && from >= 1 && to >= 1 && from / 1e3 <= to && to / 1e3 <= from, id, "asked to resample ",
            channels, " channels from ", from, " to ", to,
            " Hz, expected at least 1 of each, and rates of which one is at most 1000 times the other");
    const soxr_io_spec_t separate_channels = soxr_io_spec(SOXR_FLOAT32_S, SOXR_FLOAT32_S);
    const soxr_quality_spec_t quality = soxr_quality_spec(SOXR_VHQ, SOXR_ROLLOFF_NONE);
    soxr_error_t error = nullptr;
    state_.reset(soxr_create(from, to, static_cast<unsigned>(channels), &error, &separate_channels, &quality, nullptr));
    require(state_ != nullptr && error == nullptr, "headroom.audio.resampler.failed", "can't resample ", channels,
            " channels from ", from, " to ", to, " Hz, libsoxr says: ", error == nullptr ? "" : error);
  }

  /// Takes the next samples [C,n] of any floating dtype and device; gives those that are ready, float [C,m] on the CPU.
  /// Throws `headroom.audio.resampler.samples` (shape, dtype, or after the end).
  torch::Tensor push(const torch::Tensor& samples) {
    constexpr auto id = "headroom.audio.resampler.samples";
    require(samples.dim() == 2 && samples.size(0) == channels_ && samples.is_floating_point(), id, "got samples ",
            samples.sizes(), " of ", samples.dtype().name(), ", expected floating point [", channels_, ", n]");
    require(!finished_, id, "got ", samples.size(1), " samples after the end; a resampler is for one recording");
    taken_ += samples.size(1);
    return convert(samples.detach().to(torch::kCPU, torch::kFloat).contiguous());
  }

  /// Ends the recording and gives what is left.
  torch::Tensor finish() {
    finished_ = true;
    const torch::Tensor silence = torch::zeros({channels_, detail::frames_at_once(kBlock, from_, to_)});
    const std::int64_t length = resampled_length(taken_, from_, to_);
    std::vector<torch::Tensor> pieces = {torch::empty({channels_, 0})};
    while (given_ < length) {
      const std::int64_t left = length - given_;
      const torch::Tensor piece = convert(silence);
      pieces.push_back(piece.narrow(1, 0, std::min(left, piece.size(1))));
    }
    return torch::cat(pieces, 1);
  }

 private:
  static constexpr std::int64_t kBlock = 1 << 14;
  struct Delete {
    void operator()(soxr_t state) const { soxr_delete(state); }
  };

  torch::Tensor convert(const torch::Tensor& input) {  // [C,n]
    std::vector<torch::Tensor> pieces = {torch::empty({channels_, 0})};
    std::vector<const float*> from(static_cast<std::size_t>(channels_));
    std::vector<float*> to(static_cast<std::size_t>(channels_));
    bool more = true;
    for (std::int64_t done = 0; done < input.size(1) || more;) {
      const torch::Tensor block = torch::empty({channels_, kBlock});
      for (std::int64_t c = 0; c < channels_; ++c) {
        from[static_cast<std::size_t>(c)] = input.const_data_ptr<float>() + c * input.size(1) + done;
        to[static_cast<std::size_t>(c)] = block.data_ptr<float>() + c * kBlock;
      }
      std::size_t read = 0, written = 0;
      const soxr_error_t error = soxr_process(state_.get(), from.data(), static_cast<std::size_t>(input.size(1) - done),
                                              &read, to.data(), kBlock, &written);
      require(error == nullptr, "headroom.audio.resampler.failed", "libsoxr says: ", error == nullptr ? "" : error);
      done += static_cast<std::int64_t>(read);
      given_ += static_cast<std::int64_t>(written);
      more = written == kBlock;
      pieces.push_back(block.narrow(1, 0, static_cast<std::int64_t>(written)));
    }
    return torch::cat(pieces, 1);
  }

  std::int64_t channels_;
  int from_, to_;
  std::unique_ptr<soxr, Delete> state_;
  std::int64_t taken_ = 0, given_ = 0;  // samples of each channel
  bool finished_ = false;
};

}  // namespace headroom::inline v0::audio
