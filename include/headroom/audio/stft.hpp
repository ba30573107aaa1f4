#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/core/stft.hpp"
#include "headroom/runtime/dry_run.hpp"

namespace headroom::inline v0::audio {

/// Options of Stft; the meaning is core::StftOptions'.
struct StftOptions {
  /// Length of a frame and of its Fourier transform, in samples.
  TORCH_ARG(int64_t, n_fft) = 2048;
  /// Samples from one frame to the next.
  TORCH_ARG(int64_t, hop) = 512;
  /// Length of the window, zeros on both sides fill it up to n_fft; 0 means n_fft.
  TORCH_ARG(int64_t, window) = 0;
};

namespace detail {

/// Sound is transformed, compared and summed in double when it is double, in float for float and below.
inline torch::ScalarType compute_type(const torch::Tensor& tensor) {
  return c10::toRealValueType(tensor.scalar_type()) == torch::kDouble ? torch::kDouble : torch::kFloat;
}

/// Sizes of the tensor with `last` instead of its `dropped` last ones.
inline std::vector<int64_t> with_last_sizes(const torch::Tensor& tensor, int64_t dropped, torch::IntArrayRef last) {
  std::vector<int64_t> sizes = tensor.sizes().slice(0, tensor.dim() - dropped).vec();
  sizes.insert(sizes.end(), last.begin(), last.end());
  return sizes;
}

/// "Float [2, 44100]", for error messages.
inline std::string describe(const torch::Tensor& tensor) {
  if (!tensor.defined()) {
    return "an undefined tensor";
  }
  std::ostringstream text;
  text << tensor.scalar_type() << " " << tensor.sizes();
  return text.str();
}

}  // namespace detail

/// Short-time Fourier transform of waveforms and its inverse: torch.stft and torch.istft with center=True, reflect
/// padding, a periodic Hann window, one-sided and not normalized, for any leading dimensions. Differentiable both ways.
/// No step depends on values of a tensor (torch.istft asks for the least of its envelope): nothing waits for a GPU's
/// result, and a dry run on the meta device needs only shapes.
///
/// The module has no parameters and no buffers: the window is made for each call, on the device and in the precision of
/// the input. Nothing enters the state dict, and `module->to(torch::kBFloat16)` can't coarsen the window.
/// Half-precision input, as under autocast, is transformed in float.
class StftImpl : public torch::nn::Cloneable<StftImpl> {
 public:
  /// Throws headroom.core.stft.options.
  explicit StftImpl(const StftOptions& options_ = {}) : options(options_) { reset(); }

  void reset() override {
    layout_ = {.n_fft = options.n_fft(), .hop = options.hop(), .window = options.window()};
    layout_.check();
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "headroom::audio::Stft(n_fft=" << options.n_fft() << ", hop=" << options.hop()
           << ", window=" << layout_.window_length() << ")";
  }

  int64_t bins() const { return layout_.bins(); }

  /// Throws headroom.core.stft.length.
  int64_t frames(int64_t samples) const { return layout_.frames(samples); }

  /// Spectrum [..., F, T] (complex, F = bins(), T = frames(S)) of waveforms [..., S] (real).
  /// Throws headroom.audio.stft.waveform and headroom.core.stft.length.
  torch::Tensor forward(const torch::Tensor& waveform) {
    require(waveform.defined() && waveform.is_floating_point() && waveform.dim() >= 1, "headroom.audio.stft.waveform",
            "got ", detail::describe(waveform), "; expected real floating-point waveforms [..., S]");
    const int64_t samples = waveform.size(-1);
    const int64_t frames = layout_.frames(samples);
    const torch::ScalarType type = detail::compute_type(waveform);
    const torch::Tensor rows = waveform.to(type).reshape({waveform.numel() / samples, samples});  // [R,S]
    const torch::Tensor spectrum =
        torch::stft(rows, layout_.n_fft, layout_.hop, layout_.n_fft, padded_window(waveform.options().dtype(type)),
                    /*center=*/true, /*pad_mode=*/"reflect", /*normalized=*/false, /*onesided=*/true,
                    /*return_complex=*/true);  // [R,F,T]
    return spectrum.reshape(detail::with_last_sizes(waveform, 1, {layout_.bins(), frames}));
  }

  /// Waveforms [..., length] of spectra [..., F, T]: weighted overlap-add of the inverse transforms, so that
  /// `inverse(forward(x), x.size(-1))` is x whether or not the hop divides the length.
  /// Throws headroom.audio.stft.spectrum and headroom.core.stft.{spectrum,length,envelope}.
  torch::Tensor inverse(const torch::Tensor& spectrum, int64_t length) {
    require(spectrum.defined() && spectrum.is_complex() && spectrum.dim() >= 2, "headroom.audio.stft.spectrum", "got ",
            detail::describe(spectrum), "; expected complex spectra [..., F, T]");
    layout_.check_spectrum(spectrum.size(-2), spectrum.size(-1), length);
    const torch::ScalarType type = detail::compute_type(spectrum);
    const auto real = spectrum.options().dtype(type);
    const int64_t frames = spectrum.size(-1);
    const int64_t rows = spectrum.numel() / (layout_.bins() * frames);
    const torch::Tensor bins_last =
        spectrum.to(c10::toComplexType(type)).reshape({rows, layout_.bins(), frames}).transpose(1, 2);  // [R,T,F]
    const torch::Tensor pieces = torch::fft_irfft(bins_last, layout_.n_fft).mul_(padded_window(real));  // [R,T,n_fft]
    const torch::Tensor sum = at::unfold_backward(pieces, {rows, layout_.n_fft + (frames - 1) * layout_.hop}, 1,
                                                  layout_.n_fft, layout_.hop);  // [R,n_fft/2+length+rest]
    return (sum.narrow(1, layout_.n_fft / 2, length) / envelope(length, real))
        .reshape(detail::with_last_sizes(spectrum, 2, {length}));
  }

  StftOptions options;

 private:
  /// Periodic Hann window between its zeros.
  torch::Tensor padded_window(const torch::TensorOptions& real) const {
    const int64_t length = layout_.window_length();
    const int64_t left = (layout_.n_fft - length) / 2;
    return torch::constant_pad_nd(torch::hann_window(length, real.requires_grad(false)),
                                  {left, layout_.n_fft - length - left});  // [n_fft]
  }

  /// Sum of the squared windows at each sample, checked. Made on the CPU: it has values to check on any device.
  torch::Tensor envelope(int64_t length, const torch::TensorOptions& real) const {
    const core::Stft<double> transform(layout_);
    if (const auto planned = DryRun::device()) {
      // It repeats itself but for both ends: a short one has all that there is to check
      const int64_t ends = (4 * layout_.n_fft / layout_.hop + 2) * layout_.hop + length % layout_.hop;
      static_cast<void>(transform.envelope(std::min(length, ends)));
      const auto as_made = real.dtype(planned->is_cpu() ? torch::kDouble : c10::typeMetaToScalarType(real.dtype()));
      return torch::empty({length}, as_made).to(real);
    }
    const Eigen::VectorXd sum = transform.envelope(length);
    return at::tensor(torch::ArrayRef<double>(sum.data(), sum.size())).to(real);  // [length]
  }

  core::StftOptions layout_;
};

TORCH_MODULE(Stft);

}  // namespace headroom::inline v0::audio
