#include "headroom/training/augmentation.hpp"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using namespace headroom::training;
using testing::error_of;

namespace {

constexpr double kRate = 44100;

// The gain of filters in dB at a frequency, by the Fourier sum of what they make of an impulse.
double measured_db(const std::vector<Biquad>& filters, double frequency) {
  torch::Tensor impulse = torch::zeros({1, 1 << 14});
  impulse[0][0] = 1;
  const torch::Tensor response = filtered(impulse, filters);
  std::complex<double> sum = 0;
  for (int64_t n = 0; n < response.size(1); ++n) {
    sum += static_cast<double>(response[0].const_data_ptr<float>()[n]) *
           std::polar(1.0, -2 * std::numbers::pi * frequency / kRate * static_cast<double>(n));
  }
  return 20 * std::log10(std::abs(sum));
}

// The same of the analog filter that a band is made of, whose frequencies the bilinear transform warps.
double analog_db(Band band, double center, double decibels, double frequency) {
  const double A = std::pow(10, decibels / 40), root = std::sqrt(2 * A);
  const std::complex<double> s(
      0, std::tan(std::numbers::pi * frequency / kRate) / std::tan(std::numbers::pi * center / kRate));
  const std::complex<double> H = band == Band::peak        ? (s * s + s * A + 1.0) / (s * s + s / A + 1.0)
                                 : band == Band::low_shelf ? A * (s * s + root * s + A) / (A * s * s + root * s + 1.0)
                                                           : A * (A * s * s + root * s + 1.0) / (s * s + root * s + A);
  return 20 * std::log10(std::abs(H));
}

torch::Tensor sine(double frequency, int64_t samples) {
  return torch::sin(torch::arange(samples, torch::kDouble) * (2 * std::numbers::pi * frequency / kRate))
      .to(torch::kFloat);
}

// The frequency of a tone [n] by the first peak of its autocorrelation, between samples by a parabola.
double pitch_of(const torch::Tensor& tone) {
  const torch::Tensor x = tone.to(torch::kDouble);
  const auto at = [&](int64_t lag) {
    return (x.narrow(0, 0, x.size(0) - lag) * x.narrow(0, lag, x.size(0) - lag)).mean().item<double>();
  };
  int64_t lag = 1;
  while (at(lag) > 0) ++lag;            // behind the peak at 0
  while (at(lag + 1) > at(lag)) ++lag;  // down to the valley, and up to the next peak
  while (at(lag + 1) <= at(lag) && at(lag) < 0) ++lag;
  while (at(lag + 1) > at(lag)) ++lag;
  const double a = at(lag - 1), b = at(lag), c = at(lag + 1);
  return kRate / (static_cast<double>(lag) + 0.5 * (a - c) / (a - 2 * b + c));
}

double rms(const torch::Tensor& x) { return x.to(torch::kDouble).square().mean().sqrt().item<double>(); }

// One segment after its changes.
torch::Tensor changed(const torch::Tensor& stem, const AugmentationOptions& options, uint64_t seed = 5) {
  SplitMix64 random(1);
  Augmentation augmentation(options, random, seed);
  const int64_t source = augmentation.source_length(stem.size(1), stem.size(1));
  return augmentation.apply(stem.narrow(1, 0, source), stem.size(1), 44100);
}

}  // namespace

TEST_CASE("normal numbers have the moments of a normal distribution") {
  SplitMix64 random(3);
  constexpr int kCount = 200000;
  double mean = 0, square = 0, fourth = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = random.normal();
    mean += x / kCount;
    square += x * x / kCount;
    fourth += x * x * x * x / kCount;
  }
  CHECK(std::abs(mean) < 5 / std::sqrt(kCount));
  CHECK(std::abs(square - 1) < 5 * std::sqrt(2. / kCount));
  CHECK(std::abs(fourth - 3) < 5 * std::sqrt(96. / kCount));
}

TEST_CASE("each band of an equalizer has the response of its analog filter") {
  for (const Band band : {Band::low_shelf, Band::peak, Band::high_shelf}) {
    for (const double decibels : {-9.0, 4.0}) {
      for (const double center : {200.0, 3000.0}) {
        const std::vector<Biquad> filter = {make_biquad(band, center, decibels, kRate)};
        for (const double frequency : {0.0, 100.0, 200.0, 900.0, 3000.0, 12000.0, 22050.0}) {
          CAPTURE(static_cast<int>(band), decibels, center, frequency);
          CHECK(measured_db(filter, frequency) == Approx(analog_db(band, center, decibels, frequency)).margin(2e-3));
        }
        const double at_center = measured_db(filter, center);
        CHECK(at_center == Approx(band == Band::peak ? decibels : decibels / 2).margin(2e-3));
      }
    }
  }
  const std::vector<Biquad> two = {make_biquad(Band::peak, 500, 6, kRate), make_biquad(Band::low_shelf, 90, -3, kRate)};
  CHECK(measured_db(two, 300) ==
        Approx(analog_db(Band::peak, 500, 6, 300) + analog_db(Band::low_shelf, 90, -3, 300)).margin(2e-3));
}

TEST_CASE("a random equalizer has seven bands, fewer at low sample rates") {
  SplitMix64 random(1);
  CHECK(random_equalizer({-6, 6}, 44100, random).size() == 7);
  CHECK(random_equalizer({-6, 6}, 16000, random).size() == 6);
  CHECK(random_equalizer({-6, 6}, 8000, random).size() == 5);
  double lowest = 0, highest = 0;
  for (int i = 0; i < 50; ++i) {
    const double low = measured_db(random_equalizer({-6, 6}, kRate, random), 1);  // the low shelf alone acts there
    lowest = std::min(lowest, low);
    highest = std::max(highest, low);
  }
  CHECK(lowest > -6.1);
  CHECK(lowest < -4.5);
  CHECK(highest < 6.1);
  CHECK(highest > 4.5);
}

TEST_CASE("noise has the level that was asked for and is different in each segment") {
  AugmentationOptions options{.gain = {1, 1}, .swap_channels = false, .flip_polarity = false};
  options.noise = 1;
  options.noise_db = {-40, -40};
  const torch::Tensor silence = torch::zeros({2, 50000});
  const torch::Tensor one = changed(silence, options), other = changed(silence, options, 6);
  CHECK(20 * std::log10(rms(one)) == Approx(-40).margin(0.05));
  CHECK(std::abs(one.mean().item<double>()) < 5 * 0.01 / std::sqrt(100000));
  CHECK(std::abs((one[0] * one[1]).mean().item<double>()) < 5 * 1e-4 / std::sqrt(50000));
  CHECK(std::abs((one * other).mean().item<double>()) < 5 * 1e-4 / std::sqrt(100000));
  CHECK(torch::equal(one, changed(silence, options)));
}

TEST_CASE("changes are probabilities, and each is the same with and without the others") {
  const torch::Tensor stem = torch::randn({2, 4000}) * 0.1;
  const AugmentationOptions nothing{.gain = {1, 1}, .swap_channels = false, .flip_polarity = false};
  CHECK(torch::equal(changed(stem, nothing), stem));
  AugmentationOptions some = nothing;
  some.equalizer = 0.25;
  int count = 0;
  for (uint64_t seed = 0; seed < 400; ++seed) count += !torch::equal(changed(stem, some, seed), stem);
  CHECK(std::abs(count - 100) < 45);

  AugmentationOptions equalizer = nothing, noise = nothing;
  equalizer.equalizer = noise.noise = 1;
  AugmentationOptions both = equalizer;
  both.noise = 1;
  both.gain = {0.5, 0.5};
  const torch::Tensor sum = changed(stem, equalizer) + (changed(torch::zeros_like(stem), noise));
  CHECK(torch::allclose(changed(stem, both), sum * 0.5, 1e-5, 1e-7));
}

TEST_CASE("options of augmentations are checked") {
  const auto id = [](const auto& change) {
    AugmentationOptions options;
    change(options);
    return error_of([&] { check(options); }).id();
  };
  const std::string expected = "headroom.training.dataset.options";
  CHECK(id([](auto& o) { o.mixup = {0.5, 1.5}; }) == expected);
  CHECK(id([](auto& o) { o.equalizer = -0.5; }) == expected);
  CHECK(id([](auto& o) { o.equalizer_db = {3, -3}; }) == expected);
  CHECK(id([](auto& o) { o.tempo_factor = {0.1, 1}; }) == expected);
  CHECK(id([](auto& o) { o.noise_db = {-10, 1}; }) == expected);
  if (!kHasRubberband) {
    CHECK(id([](auto& o) { o.pitch = 0.1; }) == "headroom.training.augmentation.rubberband");
  }
}

TEST_CASE("pitch and tempo change one without the other") {
  if (!kHasRubberband) return;
  const int64_t n = 88200, middle = 30000;
  const torch::Tensor tone = torch::stack({sine(440, n), sine(440, n) * 0.5});
  for (const double semitones : {-5.0, 3.0, 12.0}) {
    const torch::Tensor changed = stretched(tone, {.semitones = semitones}, n, 44100);
    INFO(semitones << " semitones");
    CHECK(pitch_of(changed[0].narrow(0, middle, 8192)) == Approx(440 * std::exp2(semitones / 12)).epsilon(2e-3));
    CHECK(rms(changed[0].narrow(0, middle, 8192)) == Approx(std::sqrt(0.5)).epsilon(0.05));
    CHECK(rms(changed[1].narrow(0, middle, 8192)) == Approx(std::sqrt(0.125)).epsilon(0.05));
    CHECK(torch::equal(changed, stretched(tone, {.semitones = semitones}, n, 44100)));
  }
  // 300 Hz, then 500 Hz: where one turns into the other tells the tempo
  const torch::Tensor turn = torch::cat({sine(300, n / 2), sine(500, n / 2)}).unsqueeze(0);
  for (const double tempo : {0.8, 1.25}) {
    const auto length = static_cast<int64_t>(n / tempo);
    const torch::Tensor changed = stretched(turn, {.tempo = tempo}, length, 44100);
    INFO("tempo " << tempo);
    CHECK(pitch_of(changed[0].narrow(0, length / 2 - 6000, 4096)) == Approx(300).epsilon(5e-3));
    CHECK(pitch_of(changed[0].narrow(0, length / 2 + 2000, 4096)) == Approx(500).epsilon(5e-3));
    CHECK(rms(changed[0].narrow(0, length - 4096, 2048)) > 0.5);  // sound to the end
  }
}

TEST_CASE("a change of tempo asks for as many samples as become a segment, and no more than there are") {
  AugmentationOptions options;
  options.tempo = 1;
  options.tempo_factor = {1.5, 1.5};
  if (!kHasRubberband) return;
  const auto source = [&](int64_t frames) {
    SplitMix64 random(1);
    return Augmentation(options, random, 2).source_length(1000, frames);
  };
  CHECK(source(100000) == 1500);
  CHECK(source(1200) == 1200);
  CHECK(source(1000) == 1000);
  options.tempo_factor = {0.5, 0.5};
  CHECK(source(1000) == 500);
}
