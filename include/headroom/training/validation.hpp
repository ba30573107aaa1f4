#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "headroom/audio/metrics.hpp"
#include "headroom/audio/segment_model.hpp"
#include "headroom/core/error.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/example.hpp"
#include "headroom/training/separate.hpp"

namespace headroom::inline v0::training {

/// Mean over the stems of the nSDR in dB that a model reaches on the first `count` examples of a source, taken
/// together. Stems that are silent in all of them say nothing and are left out.
/// Throws headroom.training.validation_silent when all are.
HEADROOM_TRAINING double validation_nsdr(const models::Separator& model, const BatchSource& source, int64_t count);

#ifdef HEADROOM_TRAINING_HERE
HEADROOM_TRAINING double validation_nsdr(const models::Separator& model, const BatchSource& source, int64_t count) {
  const torch::NoGradGuard guard;
  const audio::detail::EvaluationMode evaluation(model);
  const torch::Device device = model->parameters().front().device();
  std::vector<audio::NsdrAccumulator> stems;
  for (int64_t index = 0; index < count; ++index) {
    const Example example = source(index, 1);                          // [1,C,S], [1,N,C,S]
    const torch::Tensor estimate = model(example.mixture.to(device));  // [1,N,C,S]
    stems.resize(static_cast<std::size_t>(estimate.size(1)));
    for (std::size_t n = 0; n < stems.size(); ++n) {
      const auto stem = static_cast<int64_t>(n);
      audio::add(stems[n], example.stems.select(1, stem), estimate.select(1, stem).cpu());  // [1,C,S]
    }
  }
  double sum = 0, sounding = 0;
  for (const audio::NsdrAccumulator& stem : stems) {
    if (stem.reference_energy() > 0) {
      sum += stem.value();
      ++sounding;
    }
  }
  require(sounding > 0, "headroom.training.validation_silent", "every stem is silent in the first ", count,
          " validation examples; raise training.validation_segments or choose other tracks for `valid`");
  return sum / sounding;
}
#endif

}  // namespace headroom::inline v0::training
