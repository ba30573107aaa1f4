#include "headroom/audio/resampler.hpp"

#include <array>
#include <cmath>
#include <numbers>

#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using audio::resampled_length;
using audio::Resampler;
using testing::error_of;

namespace {

torch::Tensor resampled(const torch::Tensor& samples, int from, int to, std::int64_t block = 1 << 20) {
  Resampler resampler(samples.size(0), from, to);
  std::vector<torch::Tensor> pieces;
  for (const torch::Tensor& piece : samples.split(block, 1)) pieces.push_back(resampler.push(piece));
  pieces.push_back(resampler.finish());
  return torch::cat(pieces, 1);
}

// sin(2π·hertz·k/rate + phase), k < count
torch::Tensor tone(double hertz, int rate, double phase, std::int64_t count) {
  return (torch::arange(count, torch::kDouble) * (2 * std::numbers::pi * hertz / rate) + phase).sin().unsqueeze(0);
}

// dB of the largest error against full scale, `edge` samples from the ends away.
double worst(const torch::Tensor& actual, const torch::Tensor& expected, std::int64_t edge) {
  const std::int64_t n = expected.size(1) - 2 * edge;
  return 20 * std::log10(testing::largest_difference(actual.narrow(1, edge, n), expected.narrow(1, edge, n)));
}

}  // namespace

TEST_CASE("resampled values are those of python-soxr") {
  struct Reference {
    int from, to;
    std::array<float, 5> values;
  };
  const std::array<std::int64_t, 5> chosen = {600, 601, 777, 1000, 1200};
  const auto i = torch::arange(5000, torch::kDouble);
  const auto signal = ((0.05 * i).sin() / 2 + (0.31 * i + 1).sin() / 4 + (0.45 * i).sin() / 8).to(torch::kFloat);
  const Reference references[] = {// by resampler_reference.py
                                  {48000, 44100, {0.51986301f, 0.48079804f, -0.71443522f, -0.65291953f, 0.12743364f}},
                                  {44100, 48000, {0.53783429f, 0.41742149f, -0.19282575f, 0.36287236f, -0.60881817f}},
                                  {22050, 44100, {0.27487701f, 0.27537405f, 0.38178834f, -0.40288389f, -0.76531434f}},
                                  {44100, 16000, {0.21758857f, 0.19769175f, -0.0086272005f, 0.069059052f, 0.57483929f}},
                                  {96000, 44100, {0.12743364f, -0.095315903f, 0.060143836f, 0.28483486f, -0.3548221f}}};
  for (const auto& [from, to, values] : references) {
    INFO(from << " to " << to);
    const torch::Tensor result = resampled(signal.unsqueeze(0), from, to);
    for (std::size_t k = 0; k < chosen.size(); ++k) {
      CHECK(std::abs(result[0][chosen[k]].item<float>() - values[k]) < 1e-6f);
    }
  }
}

TEST_CASE("a tone keeps its amplitude and its phase, there and back") {
  for (const auto& [from, to] : {std::pair{48000, 44100}, {44100, 48000}, {96000, 44100}, {44100, 44101}}) {
    for (const double share : {0.01, 0.5, 0.9}) {  // of the lower Nyquist frequency
      INFO(from << " to " << to << ", " << share);
      const double hertz = share * std::min(from, to) / 2;
      const torch::Tensor original = tone(hertz, from, 0.3, 30000);
      const torch::Tensor there = resampled(original, from, to), back = resampled(there, to, from);
      CHECK(worst(there, tone(hertz, to, 0.3, there.size(1)), 3000) < -100);
      CHECK(worst(back.narrow(1, 0, 30000), original, 6000) < -100);
    }
  }
}

TEST_CASE("the length of what is resampled follows from the rates, and back it is never shorter") {
  CHECK(resampled_length(0, 48000, 44100) == 0);
  CHECK(resampled_length(1, 48000, 8000) == 1);
  CHECK(resampled_length(48000, 48000, 44100) == 44100);
  CHECK(resampled_length(48001, 48000, 44100) == 44101);
  CHECK(resampled_length(std::int64_t{1} << 50, 3, 6) == std::int64_t{1} << 51);
  for (const auto& [from, to] : {std::pair{48000, 44100},
                                 {44100, 48000},
                                 {8000, 44100},
                                 {44100, 8000},
                                 {44100, 44101},
                                 {11025, 192000},
                                 {192000, 11025},
                                 {7, 3},
                                 {1000, 1},
                                 {1, 1000}}) {
    for (const std::int64_t frames : {0, 1, 2, 99, 4096, 10007}) {
      INFO(from << " to " << to << ", " << frames);
      const std::int64_t length = resampled_length(frames, from, to);
      CHECK(length == static_cast<std::int64_t>(std::ceil(static_cast<double>(frames) * to / from)));
      CHECK(resampled_length(length, to, from) >= frames);
      if (length < 1'000'000)
        CHECK(resampled(torch::rand({2, frames}), from, to).sizes() == torch::IntArrayRef({2, length}));
    }
  }
}

TEST_CASE("how a stream is cut changes no bit, nor do its neighbours") {
  const torch::Tensor samples = testing::noise({3, 20011}, 1, torch::kFloat);
  for (const auto& [from, to] : {std::pair{48000, 44100}, {22050, 44100}, {44100, 16000}}) {
    const torch::Tensor whole = resampled(samples, from, to);
    for (const std::int64_t block : {1, 100, 4096}) {
      if (block > 1) CHECK(torch::equal(resampled(samples, from, to, block), whole));
      if (block == 1) {
        CHECK(torch::equal(resampled(samples.narrow(1, 0, 500), from, to, 1),
                           resampled(samples.narrow(1, 0, 500), from, to)));
      }
    }
    CHECK(torch::equal(resampled(samples.narrow(0, 1, 1), from, to), whole.narrow(0, 1, 1)));
  }
}

TEST_CASE("a resampler refuses what it cannot do") {
  for (const auto& [channels, from, to] :
       {std::array{0, 1, 1}, {1, 0, 1}, {1, 44100, -1}, {2, 1, 44100}, {2, 44100, 1}}) {
    CHECK(error_of([&] { Resampler(channels, from, to); }).id() == "headroom.audio.resampler.options");
  }
  Resampler resampler(2, 48000, 44100);
  for (const torch::Tensor& samples : {torch::zeros({3, 5}), torch::zeros({2}), torch::zeros({2, 5}, torch::kInt)}) {
    CHECK(error_of([&] { resampler.push(samples); }).id() == "headroom.audio.resampler.samples");
  }
  CHECK(resampler.finish().sizes() == torch::IntArrayRef({2, 0}));
  CHECK_THAT(error_of([&] { resampler.push(torch::zeros({2, 5})); }).what(), Catch::Contains("after the end"));
}
