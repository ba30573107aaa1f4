#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// What a recording is separated several times for, each time a little different; the results are averaged.
struct TestTime {
  std::int64_t shifts = 0;         ///< times with silence of random length in front (demucs' shifts); 0: once, as it is
  std::int64_t max_shift = 22050;  ///< the longest such silence in samples, half a second in demucs
  std::uint64_t seed = 0;          ///< equal seeds, equal silences
  bool augment = false;            ///< also with the polarity flipped and, if there are several, the channels reversed
};

namespace detail {

/// The silence in front each time, in samples. Throws `headroom.audio.separator.options`.
inline std::vector<std::int64_t> shift_lengths(const TestTime& options) {
  require(options.shifts >= 0 && options.max_shift >= 0, "headroom.audio.separator.options", "got ", options.shifts,
          " shifts of up to ", options.max_shift, " samples, expected at least 0 of each");
  if (options.shifts == 0) return {0};
  std::mt19937_64 random(options.seed);
  std::vector<std::int64_t> lengths;
  for (std::int64_t i = 0; i < options.shifts; ++i) {
    lengths.push_back(static_cast<std::int64_t>(random() % (static_cast<std::uint64_t>(options.max_shift) + 1)));
  }
  return lengths;
}

/// Mean of what `model` makes of `x` [B,C,S], of -x and of x with its channels reversed, each undone: [B,N,C,S].
/// The model may work in place on what it gets.
inline torch::Tensor augmented(const std::function<torch::Tensor(const torch::Tensor&)>& model,
                               const torch::Tensor& x) {
  const bool reverse = x.size(1) > 1;
  torch::Tensor sum = -model(-x);
  if (reverse) sum += model(x.flip(1)).flip(2);
  sum += model(x);
  return sum.div_(reverse ? 3 : 2);
}

}  // namespace detail

}  // namespace headroom::inline v0::audio
