#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>
#include <type_traits>
#include <unsupported/Eigen/FFT>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::core {

/// How a signal is cut into frames. The meaning of torch.stft(center=True, pad_mode="reflect", normalized=False,
/// onesided=True) with a periodic Hann window: frame t is centred on sample t * hop, and the signal is mirrored at both
/// ends. `n_fft` may be any integer from 2 on (odd and prime too) and `hop` need not divide it.
struct StftOptions {
  Eigen::Index n_fft = 2048;  ///< length of a frame and of its Fourier transform, in samples
  Eigen::Index hop = 512;     ///< samples from one frame to the next
  Eigen::Index window = 0;    ///< length of the window, zeros on both sides fill it up to n_fft; 0 means n_fft

  /// Frequencies of a real signal: 0, 1/n_fft, ... up to half the sample rate.
  Eigen::Index bins() const { return n_fft / 2 + 1; }

  Eigen::Index window_length() const { return window == 0 ? n_fft : window; }

  /// Frames of a signal of `samples`: 1 + samples / hop for an even n_fft, 1 + (samples - 1) / hop for an odd one.
  /// Throws headroom.core.stft.length when the signal is too short to be mirrored.
  Eigen::Index frames(Eigen::Index samples) const {
    require(samples > n_fft / 2, "headroom.core.stft.length", "a signal of ", samples,
            " samples is too short for n_fft ", n_fft, ": mirroring its ends needs at least ", n_fft / 2 + 1,
            " samples; use a longer segment or a smaller n_fft");
    return 1 + (samples - n_fft % 2) / hop;
  }

  /// Throws headroom.core.stft.options for sizes that make no transform.
  void check() const {
    require(n_fft >= 2 && hop >= 1 && (window == 0 || (window >= 2 && window <= n_fft)), "headroom.core.stft.options",
            "got n_fft ", n_fft, ", hop ", hop, ", window ", window,
            "; expected n_fft >= 2, hop >= 1 and a window of 2 to n_fft samples (or 0 for n_fft)");
  }

  /// Throws headroom.core.stft.spectrum unless a signal of `length` samples has a spectrum of this size.
  void check_spectrum(Eigen::Index spectrum_bins, Eigen::Index spectrum_frames, Eigen::Index length) const {
    require(spectrum_bins == bins() && spectrum_frames == frames(length), "headroom.core.stft.spectrum",
            "got a spectrum of ", spectrum_bins, " bins x ", spectrum_frames, " frames; ", length,
            " samples with n_fft ", n_fft, " and hop ", hop, " have ", bins(), " x ", frames(length),
            "; pass the length of the signal that was transformed, and the same options");
  }
};

/// Short-time Fourier transform of a real signal and its inverse, on Eigen alone.
///
/// Immutable after construction, and every call has its own FFT plan (O(n_fft) sines, against O(n_fft log n_fft) for
/// each frame): one object may be used from several threads at once. Should a project select FFTW for Eigen, then
/// FFTW's planner rules apply. The kissfft that Eigen brings is slow, O(n_fft^2), only for large prime factors.
template <class Scalar>
requires std::is_floating_point_v<Scalar>
class Stft {
 public:
  using Signal = Eigen::VectorX<Scalar>;
  /// [bins, frames], column-major: a frame is contiguous.
  using Spectrogram = Eigen::MatrixX<std::complex<Scalar>>;

  /// Throws headroom.core.stft.options.
  explicit Stft(const StftOptions& options = {}) : options_(options) {
    options_.check();
    const Eigen::Index length = options_.window_length();
    window_ = Signal::Zero(options_.n_fft);
    for (Eigen::Index i = 0; i < length; ++i) {
      const double phase = 2.0 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(length);
      window_((options_.n_fft - length) / 2 + i) = static_cast<Scalar>(0.5 - 0.5 * std::cos(phase));
    }
  }

  const StftOptions& options() const { return options_; }
  Eigen::Index bins() const { return options_.bins(); }
  Eigen::Index frames(Eigen::Index samples) const { return options_.frames(samples); }

  /// The periodic Hann window between its zeros, n_fft values.
  const Signal& window() const { return window_; }

  /// Spectrum [bins, frames] of a signal. Throws headroom.core.stft.length.
  Spectrogram forward(const Eigen::Ref<const Signal>& signal) const {
    Spectrogram spectrum(bins(), frames(signal.size()));
    Fft fft = make_fft();
    Signal frame(options_.n_fft);
    for (Eigen::Index t = 0; t < spectrum.cols(); ++t) {
      const Eigen::Index begin = frame_begin(t);
      if (begin >= 0 && begin + options_.n_fft <= signal.size()) {
        frame = signal.segment(begin, options_.n_fft);
      } else {
        for (Eigen::Index i = 0; i < options_.n_fft; ++i) {
          frame(i) = signal(mirrored(begin + i, signal.size()));
        }
      }
      frame.array() *= window_.array();
      fft.fwd(spectrum.col(t).data(), frame.data(), static_cast<int>(options_.n_fft));
    }
    return spectrum;
  }

  /// The signal of `length` samples whose windowed frames are nearest to the spectrum (least squares): overlap-add of
  /// the windowed inverse transforms, divided by envelope(). forward() followed by inverse() gives the signal back.
  /// Like every real inverse transform it ignores the imaginary parts of bin 0 and, for even n_fft, of the last bin.
  /// Throws headroom.core.stft.spectrum, .length and .envelope.
  Signal inverse(const Eigen::Ref<const Spectrogram>& spectrum, Eigen::Index length) const {
    options_.check_spectrum(spectrum.rows(), spectrum.cols(), length);
    const Signal weights = envelope(length);
    Fft fft = make_fft();
    Signal signal = Signal::Zero(length);
    Signal frame(options_.n_fft);
    for (Eigen::Index t = 0; t < spectrum.cols(); ++t) {
      fft.inv(frame.data(), spectrum.col(t).data(), static_cast<int>(options_.n_fft));
      overlap_add(frame.cwiseProduct(window_), t, signal);
    }
    return signal.cwiseQuotient(weights);
  }

  /// Sum over the frames of the squared window, at every sample of a signal of `length` samples.
  /// Throws headroom.core.stft.envelope where no frame sees a sample (the sum is below 1e-11, PyTorch's limit).
  Signal envelope(Eigen::Index length) const {
    Signal sum = Signal::Zero(length);
    const Signal squares = window_.cwiseAbs2();
    for (Eigen::Index t = 0; t < frames(length); ++t) {
      overlap_add(squares, t, sum);
    }
    Eigen::Index sample = 0;
    const Scalar least = sum.minCoeff(&sample);
    require(least > Scalar(1e-11), "headroom.core.stft.envelope", "hop ", options_.hop, " with a window of ",
            options_.window_length(), " samples leaves sample ", sample, " of ", length,
            " outside every window, so no inverse exists; use a hop of at most half the window");
    return sum;
  }

 private:
  using Fft = Eigen::FFT<Scalar>;

  static Fft make_fft() { return Fft(typename Fft::impl_type(), Fft::HalfSpectrum); }

  /// First sample of frame t, negative where the frame begins in the mirrored part.
  Eigen::Index frame_begin(Eigen::Index t) const { return t * options_.hop - options_.n_fft / 2; }

  static Eigen::Index mirrored(Eigen::Index i, Eigen::Index size) {
    const Eigen::Index right_of_start = i < 0 ? -i : i;
    return right_of_start < size ? right_of_start : 2 * (size - 1) - right_of_start;
  }

  /// Adds the part of frame t that lies inside the signal.
  template <class Frame>
  void overlap_add(const Frame& frame, Eigen::Index t, Signal& signal) const {
    const Eigen::Index begin = frame_begin(t);
    const Eigen::Index first = std::max<Eigen::Index>(begin, 0);
    const Eigen::Index count = std::min(begin + options_.n_fft, signal.size()) - first;
    signal.segment(first, count) += frame.segment(first - begin, count);
  }

  StftOptions options_;
  Signal window_;
};

}  // namespace headroom::inline v0::core
