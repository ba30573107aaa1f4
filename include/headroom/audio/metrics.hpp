#pragma once

#include <torch/types.h>

#include <Eigen/Core>
#include <cstdint>

#include "headroom/audio/stft.hpp"
#include "headroom/core/nsdr.hpp"

namespace headroom::inline v0::audio {

using core::NsdrAccumulator;

/// Adds a block of one stem, two tensors of any one shape, real, on any device, to the accumulator.
/// Throws headroom.audio.nsdr.shape.
inline void add(NsdrAccumulator& accumulator, const torch::Tensor& reference, const torch::Tensor& estimate) {
  require(reference.defined() && estimate.defined() && reference.sizes() == estimate.sizes() &&
              reference.is_floating_point() && estimate.is_floating_point(),
          "headroom.audio.nsdr.shape", "got a reference ", detail::describe(reference), " and an estimate ",
          detail::describe(estimate), "; expected two real floating-point tensors of the same shape");
  const auto add_as = [&]<class Scalar>(torch::ScalarType type) {
    using Samples = Eigen::Map<const Eigen::VectorX<Scalar>>;
    const torch::Tensor s = reference.detach().to(torch::kCPU, type).contiguous();
    const torch::Tensor e = estimate.detach().to(torch::kCPU, type).contiguous();
    accumulator.add(Samples(s.const_data_ptr<Scalar>(), s.numel()), Samples(e.const_data_ptr<Scalar>(), e.numel()));
  };
  if (detail::compute_type(reference) == torch::kDouble || detail::compute_type(estimate) == torch::kDouble) {
    add_as.template operator()<double>(torch::kDouble);
  } else {
    add_as.template operator()<float>(torch::kFloat);
  }
}

/// Signal-to-distortion ratio in dB of each stem: [..., C, S] -> [...], in double on the CPU, not differentiable.
/// NsdrAccumulator has the formula, the meaning for silent references, and the way to go block by block.
/// Throws headroom.audio.nsdr.shape and headroom.core.nsdr.epsilon.
inline torch::Tensor nsdr(const torch::Tensor& reference, const torch::Tensor& estimate, double epsilon = 1e-8) {
  require(reference.defined() && estimate.defined() && reference.dim() >= 2 && reference.sizes() == estimate.sizes(),
          "headroom.audio.nsdr.shape", "got references ", detail::describe(reference), " and estimates ",
          detail::describe(estimate), "; expected two tensors of the same shape [..., channels, samples]");
  torch::Tensor values = torch::empty(detail::with_last_sizes(reference, 2, {}), torch::kDouble);
  const int64_t stems = values.numel();
  const torch::Tensor references = reference.reshape({stems, reference.size(-2), reference.size(-1)});  // [N,C,S]
  const torch::Tensor estimates = estimate.reshape(references.sizes());                                 // [N,C,S]
  for (int64_t stem = 0; stem < stems; ++stem) {
    NsdrAccumulator accumulator(epsilon);
    add(accumulator, references[stem], estimates[stem]);
    values.data_ptr<double>()[stem] = accumulator.value();
  }
  return values;
}

}  // namespace headroom::inline v0::audio
