#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "headroom/audio/segment_model.hpp"
#include "headroom/audio/separator_stream.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// Gives the next samples of a recording when asked for at most `frames`: [C,n], or [1,n] for every channel the same;
/// n = 0 at the end.
using Source = std::function<torch::Tensor(std::int64_t frames)>;
/// Takes finished samples [N,C,n] in order. The tensor is valid during the call only: clone it to keep it.
using StemSink = std::function<void(const torch::Tensor& stems)>;

namespace detail {

inline constexpr std::int64_t kFramesAtOnce = 1 << 16;  ///< asked of a source

/// Pushes what `source` gives into `stream` until it ends. Throws `headroom.audio.separator.source`.
template <class Stream>
void drain(const Source& source, std::int64_t channels, Stream& stream) {
  while (true) {
    torch::Tensor block = source(kFramesAtOnce);  // [C,n] or [1,n]
    require(block.dim() == 2 && (block.size(0) == channels || block.size(0) == 1), "headroom.audio.separator.source",
            "got samples ", block.sizes(), ", expected [", channels, ", n] or [1, n]");
    const std::int64_t n = block.size(1);
    if (n == 0) {
      break;
    }
    block = block.detach().to(torch::kCPU, torch::kFloat).expand({channels, n}).contiguous();
    stream.push(Eigen::Map<const Samples>(block.data_ptr<float>(), channels, n));
  }
  stream.finish();
}

}  // namespace detail

/// Separates a recording of any length in the memory of a batch of segments, see SeparatorStream. `model` maps segments
/// of a mixture [B,C,S] on options.device to stems [B,N,C,S]; it runs without gradients, and a module holder in
/// evaluation mode (each submodule's own mode is restored after).
/// Throws `headroom.audio.separator.options`, `headroom.audio.separator.source`, `headroom.audio.separator.model`
/// (shape), `headroom.core.segments.options`, `headroom.core.overlap_add.options`, and whatever the source, model and
/// sink throw.
template <class Model>
void separate(const Source& source, Model&& model, const SeparatorOptions& options, const StemSink& sink) {
  SeparatorStream stream(segment_model(std::forward<Model>(model)), options, [&](const SamplesRef& finished) {
    sink(detail::stems_of(finished, options.stems, options.channels));
  });
  detail::drain(source, options.channels, stream);
}

namespace detail {

/// Stems [N,C,T] of `mixture` [C,T] or [1,T] by a streaming form, `separate(source, sink)`.
template <class Separate>
torch::Tensor in_memory(const torch::Tensor& mixture, torch::IntArrayRef stems_and_channels, Separate&& separate) {
  require(mixture.dim() == 2, "headroom.audio.separator.source", "got a mixture ", mixture.sizes(),
          ", expected [channels, samples]");
  const std::int64_t length = mixture.size(1);
  const torch::Tensor stems = torch::empty({stems_and_channels[0], stems_and_channels[1], length});
  std::int64_t taken = 0, done = 0;
  const Source source = [&](std::int64_t frames) {
    const std::int64_t n = std::min(frames, length - taken);
    return mixture.narrow(1, std::exchange(taken, taken + n), n);
  };
  separate(source, [&](const torch::Tensor& finished) {
    stems.narrow(2, done, finished.size(2)).copy_(finished);
    done += finished.size(2);
  });
  return stems;
}

}  // namespace detail

/// Separates a recording in memory: `mixture` [C,T], or [1,T] for every channel the same, gives stems [N,C,T] on the
/// CPU. Throws like the streaming form.
template <class Model>
torch::Tensor separate(const torch::Tensor& mixture, Model&& model, const SeparatorOptions& options) {
  return detail::in_memory(mixture, {options.stems, options.channels},
                           [&](const Source& source, const StemSink& sink) { separate(source, model, options, sink); });
}

}  // namespace headroom::inline v0::audio
