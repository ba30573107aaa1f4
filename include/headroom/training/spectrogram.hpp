#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/mel.hpp"

// Pictures of sound for a web page. They are bitmaps of 256 colours, which every browser shows and which need no
// library: PNG would make them a third as large.

namespace headroom::inline v0::training {

/// Levels of time and frequency, 0 to 255, a row each, the highest frequency first.
struct Spectrogram {
  static constexpr int64_t kColumns = 240, kRows = 96;
  static constexpr double kRange = 80;  ///< dB from 0 to 255
  std::vector<std::uint8_t> levels = std::vector<std::uint8_t>(kColumns * kRows);
};

namespace detail {

/// Power of [C,S] by frequency and time, in the shape of a Spectrogram: the greatest of the bins that a row stands for,
/// rows being equally far from each other in mel. The mean over the channels.
inline torch::Tensor power_by_mel(const torch::Tensor& samples, double sample_rate) {
  const int64_t length = samples.size(-1), n_fft = std::min<int64_t>(2048, length / 2 * 2);
  const int64_t hop = std::max<int64_t>(1, length / (Spectrogram::kColumns - 1));
  const torch::Tensor spectrum =
      torch::stft(samples.to(torch::kCPU, torch::kFloat), n_fft, hop, n_fft, torch::hann_window(n_fft),
                  /*center=*/true, "constant", /*normalized=*/false, /*onesided=*/true, /*return_complex=*/true)
          .abs()
          .square()
          .mean(0);  // [F,T]
  const double highest = core::detail::hertz_to_mel(sample_rate / 2);
  const auto bin_of = [&](int64_t row) {
    const double hertz = core::detail::mel_to_hertz(highest * static_cast<double>(row) / Spectrogram::kRows);
    return static_cast<int64_t>(std::llround(hertz / sample_rate * static_cast<double>(n_fft)));
  };
  std::vector<torch::Tensor> rows;
  for (int64_t row = Spectrogram::kRows - 1; row >= 0; --row) {
    const int64_t first = bin_of(row), end = std::max(first + 1, bin_of(row + 1));
    rows.push_back(spectrum.slice(0, first, end).amax(0));
  }
  const torch::Tensor columns =
      torch::linspace(0, static_cast<double>(spectrum.size(1) - 1), Spectrogram::kColumns).round().to(torch::kLong);
  return torch::stack(rows).index_select(1, columns).contiguous();
}

}  // namespace detail

/// The greatest power in a recording [C,S]: what levels are relative to.
inline double loudest(const torch::Tensor& samples, double sample_rate) {
  return std::max(1e-12, detail::power_by_mel(samples, sample_rate).max().item<double>());
}

/// Of a recording [C,S]; 255 stands for `loudest` and more.
inline Spectrogram spectrogram(const torch::Tensor& samples, double sample_rate, double loudest) {
  const torch::Tensor decibels =
      10 * (detail::power_by_mel(samples, sample_rate) / loudest).clamp_min(1e-12).log10();  // [rows,columns]
  const torch::Tensor levels =
      ((decibels / Spectrogram::kRange + 1).clamp(0, 1) * 255).round().to(torch::kByte).contiguous();
  Spectrogram picture;
  std::copy_n(levels.const_data_ptr<std::uint8_t>(), levels.numel(), picture.levels.begin());
  return picture;
}

namespace detail {

inline std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t word = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      word = word << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0);
    }
    for (std::size_t j = 0; j < 4; ++j) text += i + j > bytes.size() ? '=' : kDigits[word >> (18 - 6 * j) & 63];
  }
  return text;
}

/// 256 colours from black over violet and orange to a light yellow, each brighter than the one before: blue, green,
/// red, nothing.
inline std::string palette() {
  constexpr std::array<std::array<double, 3>, 6> kColours = {
      {{0, 0, 4}, {75, 15, 110}, {150, 40, 110}, {222, 75, 60}, {252, 160, 30}, {252, 255, 180}}};
  std::string colours;
  for (int level = 0; level < 256; ++level) {
    const double at = level / 255.0 * (kColours.size() - 1);
    const auto below = std::min(static_cast<std::size_t>(at), kColours.size() - 2);
    const double share = at - static_cast<double>(below);
    for (const std::size_t channel : {2, 1, 0}) {
      const double mixed = kColours[below][channel] * (1 - share) + kColours[below + 1][channel] * share;
      colours += static_cast<char>(static_cast<unsigned char>(mixed));
    }
    colours += '\0';
  }
  return colours;
}

}  // namespace detail

/// The picture as the address of an image in a page: a bitmap (BITMAPINFOHEADER, 8 bits a point, the lowest row first).
inline std::string image_address(const Spectrogram& picture) {
  constexpr std::uint32_t kHeader = 14 + 40, kPalette = 4 * 256;
  std::string bytes = "BM";
  const auto put = [&](std::uint32_t value, int size) {
    for (int i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i) & 255);
  };
  put(static_cast<std::uint32_t>(kHeader + kPalette + picture.levels.size()), 4);
  put(0, 4);
  put(kHeader + kPalette, 4);
  put(40, 4);
  put(Spectrogram::kColumns, 4);
  put(Spectrogram::kRows, 4);
  put(1, 2);               // planes
  put(8, 2);               // bits a point
  bytes.append(16, '\0');  // no compression, sizes by default
  put(256, 4);
  put(0, 4);
  bytes += detail::palette();
  static_assert(Spectrogram::kColumns % 4 == 0, "rows of a bitmap are multiples of 4 bytes");
  for (int64_t row = Spectrogram::kRows - 1; row >= 0; --row) {
    const auto first = picture.levels.begin() + row * Spectrogram::kColumns;
    bytes.append(first, first + Spectrogram::kColumns);
  }
  return "data:image/bmp;base64," + detail::base64(bytes);
}

}  // namespace headroom::inline v0::training
