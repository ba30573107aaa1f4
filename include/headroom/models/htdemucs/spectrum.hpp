#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "headroom/audio/stft.hpp"

namespace headroom::inline v0::models {

/// The spectra of demucs: one frame a hop and no more, so that their steps are those of a waveform convolved with
/// strides; real and imaginary parts as channels; without the highest frequency; divided by the root of the frame's
/// length.
class DemucsSpectrum {
 public:
  explicit DemucsSpectrum(int64_t n_fft) : n_fft_(n_fft), stft_(audio::StftOptions().n_fft(n_fft).hop(n_fft / 4)) {}

  /// waveforms [B,C,S] -> real [B,2·C,n_fft/2,ceil(S/hop)]
  torch::Tensor forward(const torch::Tensor& waveform) {
    const int64_t samples = waveform.size(-1), frames = (samples + hop() - 1) / hop();
    const torch::Tensor padded = mirrored(waveform, margin(), margin() + frames * hop() - samples);
    const torch::Tensor spectrum =
        stft_->forward(padded).narrow(-2, 0, n_fft_ / 2).narrow(-1, kBorderFrames, frames);  // [B,C,F,T]
    return torch::view_as_real(spectrum).permute({0, 1, 4, 2, 3}).flatten(1, 2) / scale();
  }

  /// real [B,N,2·C,n_fft/2,T] -> waveforms [B,N,C,samples]
  torch::Tensor inverse(const torch::Tensor& spectrum, int64_t samples) {
    const torch::Tensor complex = torch::view_as_complex(
        (spectrum * scale()).unflatten(2, {-1, 2}).permute({0, 1, 2, 4, 5, 3}).contiguous());  // [B,N,C,F,T]
    const int64_t whole = spectrum.size(-1) * hop() + 2 * margin();
    return stft_->inverse(torch::constant_pad_nd(complex, {kBorderFrames, kBorderFrames, 0, 1}), whole)
        .narrow(-1, margin(), samples);
  }

 private:
  /// Frames at either end that the margins make, and that are left out.
  static constexpr int64_t kBorderFrames = 2;

  int64_t hop() const { return n_fft_ / 4; }
  int64_t margin() const { return hop() / 2 * 3; }
  double scale() const { return std::sqrt(static_cast<double>(n_fft_)); }

  /// Mirrors both ends. A signal too short for that is filled up with zeros, behind it first.
  static torch::Tensor mirrored(torch::Tensor x, int64_t left, int64_t right) {
    const int64_t missing = std::max<int64_t>(std::max(left, right) - x.size(-1) + 1, 0);
    const int64_t behind = std::min(missing, right), before = missing - behind;
    if (missing > 0) x = torch::constant_pad_nd(x, {before, behind});
    return torch::reflection_pad1d(x, {left - before, right - behind});
  }

  int64_t n_fft_;
  audio::Stft stft_;
};

}  // namespace headroom::inline v0::models
