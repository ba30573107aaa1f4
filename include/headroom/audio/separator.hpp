#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/overlap_add.hpp"

namespace headroom::inline v0::audio {

/// How a recording is separated. Lengths are in samples; core::OverlapAddOptions explains overlap, fade and padding.
struct SeparatorOptions {
  std::int64_t segment = 441000;          ///< length the model works on, best the one it was trained with
  double overlap = 0.25;                  ///< share of a segment that the next one covers again, in [0, 1)
  std::optional<std::int64_t> fade = {};  ///< default segment / 2
  core::TailPadding padding = core::TailPadding::reflect;
  std::int64_t channels = 2;           ///< C
  std::int64_t stems = 4;              ///< N
  torch::Device device = torch::kCPU;  ///< where the model is
};

namespace detail {

inline constexpr std::int64_t kFramesAtOnce = 1 << 16;  ///< asked of a source

/// Switches a module holder to evaluation for its lifetime and gives every submodule its mode back; does nothing to a
/// plain function.
template <class Model>
class EvaluationMode {
 public:
  explicit EvaluationMode(Model& model) {
    if constexpr (requires { model->modules(); }) {
      for (const auto& module : model->modules()) {  // parents come before their children
        modes_.emplace_back(module, module->is_training());
      }
      model->eval();
    }
  }
  EvaluationMode(const EvaluationMode&) = delete;
  EvaluationMode& operator=(const EvaluationMode&) = delete;
  ~EvaluationMode() {
    for (const auto& [module, training] : modes_) {
      module->train(training);
    }
  }

 private:
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
};

inline core::OverlapAddOptions overlap_add_options(const SeparatorOptions& options) {
  require(options.channels > 0 && options.stems > 0, "headroom.audio.separator.options", "got ", options.channels,
          " channels and ", options.stems, " stems, expected at least 1 of each");
  return {.segment = options.segment,
          .overlap = options.overlap,
          .fade = options.fade,
          .padding = options.padding,
          .in_channels = options.channels,
          .out_channels = options.stems * options.channels};
}

}  // namespace detail

/// Gives the next samples of a recording when asked for at most `frames`: [C,n], or [1,n] for every channel the same;
/// n = 0 at the end.
using Source = std::function<torch::Tensor(std::int64_t frames)>;
/// Takes finished samples [N,C,n] in order. The tensor is valid during the call only: clone it to keep it.
using StemSink = std::function<void(const torch::Tensor& stems)>;

/// Separates a recording of any length in the memory of one segment, see core::OverlapAdd. `model` maps a mixture
/// [1,C,S] on options.device to stems [1,N,C,S]; it runs without gradients, and a module holder in evaluation mode
/// (each submodule's own mode is restored after).
/// Throws `headroom.audio.separator.options`, `headroom.audio.separator.source`, `headroom.audio.separator.model`
/// (shape), `headroom.core.overlap_add.options`, and whatever the source, model and sink throw.
template <class Model>
void separate(const Source& source, Model&& model, const SeparatorOptions& options, const StemSink& sink) {
  using Blend = core::OverlapAdd<float>;
  const std::int64_t C = options.channels, N = options.stems, S = options.segment;
  const torch::NoGradGuard no_grad;
  const detail::EvaluationMode evaluation(model);

  const auto run = [&](const Blend::ConstBlockRef& input, Blend::BlockRef output) {
    const torch::Tensor segment = torch::from_blob(const_cast<float*>(input.data()), {1, C, S}, torch::kFloat);
    // A copy, since a model may work in place and the next segment needs these samples again.
    const torch::Tensor stems = model(segment.to(options.device, torch::kFloat, /*non_blocking=*/false, /*copy=*/true));
    require(stems.sizes() == torch::IntArrayRef({1, N, C, S}), "headroom.audio.separator.model", "the model made ",
            stems.sizes(), " of ", segment.sizes(), ", expected ", torch::IntArrayRef({1, N, C, S}),
            "; options.stems, channels and segment have to be the model's");
    torch::from_blob(output.data(), {1, N, C, S}, torch::kFloat).copy_(stems);
  };
  const auto hand_out = [&](const Blend::ConstBlockRef& finished) {
    const std::int64_t stride = finished.outerStride();
    sink(torch::from_blob(const_cast<float*>(finished.data()), {N, C, finished.cols()}, {C * stride, stride, 1},
                          torch::kFloat));
  };

  Blend blend(detail::overlap_add_options(options), run, hand_out);
  while (true) {
    torch::Tensor block = source(detail::kFramesAtOnce);  // [C,n] or [1,n]
    require(block.dim() == 2 && (block.size(0) == C || block.size(0) == 1), "headroom.audio.separator.source",
            "got samples ", block.sizes(), ", expected [", C, ", n] or [1, n]");
    if (block.size(1) == 0) {
      break;
    }
    block = block.to(torch::kCPU, torch::kFloat).expand({C, block.size(1)}).contiguous();
    blend.push(Eigen::Map<const Blend::Block>(block.data_ptr<float>(), C, block.size(1)));
  }
  blend.finish();
}

/// Separates a recording in memory: `mixture` [C,T], or [1,T] for every channel the same, gives stems [N,C,T] on the
/// CPU. Throws like the streaming form.
template <class Model>
torch::Tensor separate(const torch::Tensor& mixture, Model&& model, const SeparatorOptions& options) {
  require(mixture.dim() == 2, "headroom.audio.separator.source", "got a mixture ", mixture.sizes(),
          ", expected [channels, samples]");
  const std::int64_t length = mixture.size(1);
  const torch::Tensor stems = torch::empty({options.stems, options.channels, length});  // [N,C,T]
  std::int64_t taken = 0, done = 0;
  const Source source = [&](std::int64_t frames) {
    const std::int64_t n = std::min(frames, length - taken);
    return mixture.narrow(1, std::exchange(taken, taken + n), n);
  };
  separate(source, model, options, [&](const torch::Tensor& finished) {
    stems.narrow(2, done, finished.size(2)).copy_(finished);
    done += finished.size(2);
  });
  return stems;
}

}  // namespace headroom::inline v0::audio
