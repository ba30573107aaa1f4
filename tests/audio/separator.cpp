#include "headroom/audio/separator.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "headroom/audio/ensemble.hpp"
#include "support/catch.hpp"

using namespace headroom;
using audio::SeparatorOptions;
using testing::error_of;

namespace {

// Stem n is the mixture times n + 1: a model that any cut and blend must leave alone.
torch::Tensor scale(const torch::Tensor& mixture) {             // [1,C,S]
  return torch::stack({mixture, 2 * mixture, 3 * mixture}, 1);  // [1,3,C,S]
}

// Adds the mean of its segment and works in place; sees its own mode and whether gradients are on.
struct ProbeImpl : torch::nn::Module {
  ProbeImpl() {
    frozen = register_module("frozen", torch::nn::Linear(1, 1));
    frozen->eval();
  }
  torch::Tensor forward(torch::Tensor x) {
    CHECK_FALSE(is_training());
    CHECK_FALSE(torch::GradMode::is_enabled());
    CHECK((x * frozen->weight).requires_grad() == false);
    return x.add_(x.mean()).unsqueeze(1);
  }
  torch::nn::Linear frozen{nullptr};
};
TORCH_MODULE(Probe);

}  // namespace

TEST_CASE("separating in memory keeps every sample in place, for any length") {
  for (const std::int64_t length : {0, 1, 7, 64, 65, 997, 70001}) {
    const torch::Tensor mixture = torch::randn({2, length});
    const torch::Tensor stems = audio::separate(mixture, scale, {.segments = {.length = 64}, .stems = 3});
    REQUIRE(stems.sizes() == torch::IntArrayRef({3, 2, length}));
    for (int n = 0; n < 3; ++n) {
      CHECK(torch::allclose(stems[n], (n + 1) * mixture, 1e-6, 1e-6));
    }
  }
}

TEST_CASE("segments are blended with the weights of overlap-add") {
  // Segments of 4 with step 2 at 0, 2, 4; the model returns the number of the segment; triangle 1 2 2 1 over 3.
  int segment = 0;
  const auto number = [&](const torch::Tensor& x) {
    CHECK(x.sizes() == torch::IntArrayRef({1, 1, 4}));
    return torch::full({1, 1, 1, 4}, ++segment);
  };
  const auto stems = audio::separate(torch::zeros({1, 8}), number,
                                     {.segments = {.length = 4, .overlap = 0.5}, .channels = 1, .stems = 1});
  const auto expected = torch::tensor({1., 1., 4. / 3, 5. / 3, 7. / 3, 8. / 3, 3., 3.}).to(torch::kFloat);
  CHECK(segment == 3);
  CHECK(torch::allclose(stems.flatten(), expected));
}

TEST_CASE("a module runs in evaluation mode without gradients, on a copy, and gets its modes back") {
  Probe model;
  model->train();
  model->frozen->eval();
  const torch::Tensor mixture = torch::ones({2, 10});
  const auto stems = audio::separate(mixture, model, {.segments = {.length = 4, .overlap = 0.5}, .stems = 1});
  CHECK(torch::allclose(stems, torch::full({1, 2, 10}, 2.)));  // would grow where segments overlap if in place
  CHECK(torch::equal(mixture, torch::ones({2, 10})));
  CHECK(model->is_training());
  CHECK_FALSE(model->frozen->is_training());
  CHECK(torch::GradMode::is_enabled());
  const auto failing = [](const torch::Tensor&) -> torch::Tensor { fail("test.model", "no"); };
  CHECK(error_of([&] { audio::separate(mixture, failing, {.segments = {.length = 4}}); }).id() == "test.model");
  CHECK(torch::GradMode::is_enabled());
}

// Depends on the place in the segment and not evenly on the polarity and the channels.
torch::Tensor uneven(const torch::Tensor& x) {  // [B,C,S]
  const torch::Tensor place = torch::arange(x.size(2)).to(torch::kFloat) / x.size(2);
  const torch::Tensor weight = torch::arange(1, x.size(1) + 1).to(torch::kFloat).unsqueeze(1);
  return torch::stack({x * place + 0.1, weight * x.square()}, 1);  // [B,2,C,S]
}

TEST_CASE("several segments in one call of the model give what one at a time gives") {
  const torch::Tensor mixture = torch::randn({2, 1000});
  SeparatorOptions options{.segments = core::like_msst(64, 4), .stems = 2};
  const torch::Tensor one = audio::separate(mixture, uneven, options);
  for (const std::int64_t batch : {2, 5, 100}) {
    std::vector<std::int64_t> sizes;
    options.batch = batch;
    const auto several = audio::separate(
        mixture,
        [&](const torch::Tensor& x) {
          sizes.push_back(x.size(0));
          return uneven(x);
        },
        options);
    CHECK(torch::equal(several, one));
    CHECK(*std::max_element(sizes.begin(), sizes.end()) == std::min<std::int64_t>(batch, 66));
    CHECK(std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0}) == 66);  // ceil((1000 + 2 · 48 - 64) / 16) + 1
  }
}

TEST_CASE("shifts are the mean over silences of random length in front, the same for the same seed") {
  const torch::Tensor mixture = torch::randn({2, 700});
  SeparatorOptions options{.segments = core::like_demucs(64), .stems = 2, .test_time = {.max_shift = 100, .seed = 5}};
  torch::Tensor sum = torch::zeros({2, 2, 700});
  options.test_time.shifts = 3;
  const std::vector<std::int64_t> lengths = audio::detail::shift_lengths(options.test_time);
  REQUIRE(lengths.size() == 3);
  const torch::Tensor shifted = audio::separate(mixture, uneven, options);
  CHECK(torch::equal(audio::separate(mixture, uneven, options), shifted));
  options.test_time.seed = 6;
  CHECK_FALSE(torch::equal(audio::separate(mixture, uneven, options), shifted));
  options.test_time.shifts = 0;
  for (const std::int64_t length : lengths) {
    CHECK((0 <= length && length <= 100));
    sum += audio::separate(torch::constant_pad_nd(mixture, {length, 0}), uneven, options).narrow(2, length, 700);
  }
  CHECK(torch::allclose(shifted, sum / 3, 1e-6, 1e-6));
}

TEST_CASE("silence around a recording is 0 for a model that is told the recording's level, in front and behind it") {
  const torch::Tensor mixture = torch::randn({2, 700}) + 5;
  SeparatorOptions options{.segments = core::like_demucs(64), .stems = 2, .test_time = {.max_shift = 100}};
  options.test_time.shifts = GENERATE(0, 1, 3);
  // What a model makes of a segment depends on the silence in it
  const auto model = [](const torch::Tensor& x) { return torch::stack({x + x.mean(2, true), x.square()}, 1); };
  const torch::Tensor expected = audio::separate((mixture - 5) / 3, model, options) * 3 + 5;
  options.level = audio::Level{.mean = 5, .deviation = 3};
  CHECK(torch::allclose(audio::separate(mixture, model, options), expected, 1e-6, 1e-6));
}

TEST_CASE("augmentation is the mean over the mixture, its polarity flipped and its channels reversed, each undone") {
  for (const std::int64_t channels : {1, 2, 3}) {
    const torch::Tensor mixture = torch::randn({channels, 300});
    SeparatorOptions options{.segments = core::like_audio_separator(64, 4), .channels = channels, .stems = 2};
    const auto plain = [&](const torch::Tensor& x) { return audio::separate(x, uneven, options); };
    torch::Tensor expected = plain(mixture) - plain(-mixture);
    if (channels > 1) expected += plain(mixture.flip(0)).flip(1);
    options.test_time.augment = true;
    options.batch = 3;
    CHECK(torch::allclose(plain(mixture), expected / (channels > 1 ? 3 : 2), 1e-6, 1e-6));
  }
}

TEST_CASE("with bf16 the model runs under autocast and its results are float") {
  torch::manual_seed(0);
  torch::nn::Linear linear(8, 8);
  const auto model = [&](const torch::Tensor& x) { return linear(x).unsqueeze(1); };
  const torch::Tensor mixture = torch::randn({2, 80});
  SeparatorOptions options{.segments = {.length = 8}, .stems = 1};
  const torch::Tensor exact = audio::separate(mixture, model, options);
  options.bf16 = true;
  const torch::Tensor rounded = audio::separate(mixture, model, options);
  CHECK(rounded.scalar_type() == torch::kFloat);
  CHECK_FALSE(torch::equal(rounded, exact));
  CHECK(torch::allclose(rounded, exact, 0.02, 0.02));
  CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

// Makes `stems` of a mixture that differ by `seed`.
audio::SegmentModel model_of(std::int64_t stems, double seed) {
  return [=](const torch::Tensor& x) {
    std::vector<torch::Tensor> made;
    for (std::int64_t n = 0; n < stems; ++n) made.push_back((x * (seed + static_cast<double>(n))).sin());
    return torch::stack(made, 1);
  };
}

// Three models with stems, segments, windows, batches and shifts of their own.
audio::Ensemble three_models() {
  return {.members = {{.model = model_of(2, 0.5),
                       .options = {.segments = core::like_msst(200, 4), .batch = 3, .stems = 2},
                       .stems = {"vocals", "other"}},
                      {.model = model_of(3, 1.5),
                       .options = {.segments = core::like_demucs(333), .stems = 3, .test_time = {.shifts = 2}},
                       .stems = {"drums", "other", "vocals"}},
                      {.model = model_of(1, 2.5),
                       .options = {.segments = core::like_audio_separator(64, 8), .stems = 1},
                       .stems = {"vocals"}}}};
}

TEST_CASE("an ensemble combines each stem from the models that have it") {
  const torch::Tensor mixture = torch::randn({2, 3000});
  audio::Ensemble ensemble = three_models();
  CHECK(ensemble.stems() == std::vector<std::string>{"vocals", "other", "drums"});
  std::vector<torch::Tensor> alone;
  for (const auto& member : ensemble.members) {
    alone.push_back(audio::separate(mixture, member.model, member.options));
  }
  const torch::Tensor vocals = torch::stack({alone[0][0], alone[1][2], alone[2][0]});
  const torch::Tensor other = torch::stack({alone[0][1], alone[1][1]});
  const auto smallest = [](const torch::Tensor& x) { return x.gather(0, x.abs().argmin(0, true))[0]; };
  const auto expect = [&](const torch::Tensor& expected_vocals, const torch::Tensor& expected_other) {
    const torch::Tensor stems = audio::separate(mixture, ensemble);
    REQUIRE(stems.sizes() == torch::IntArrayRef({3, 2, 3000}));
    CHECK(torch::allclose(stems[0], expected_vocals, 1e-6, 1e-6));
    CHECK(torch::allclose(stems[1], expected_other, 1e-6, 1e-6));
    CHECK(torch::allclose(stems[2], alone[1][0], 1e-6, 1e-6));
  };
  using core::Domain;
  using core::Statistic;
  expect(vocals.mean(0), other.mean(0));
  ensemble.combination = {Statistic::median, Domain::waveform};
  expect(std::get<0>(vocals.median(0)), other.mean(0));
  ensemble.combination = {Statistic::min, Domain::waveform};
  expect(smallest(vocals), smallest(other));
  ensemble.combination = {Statistic::max, Domain::spectrum};
  CHECK(torch::allclose(audio::separate(mixture, ensemble)[2], alone[1][0], 1e-6, 1e-6));
  ensemble.combination = {Statistic::mean, Domain::spectrum};
  ensemble.members[0].weights = {3, 1};
  ensemble.members[1].weights = {1, 0.5, 2};
  expect((3 * vocals[0] + 2 * vocals[1] + vocals[2]) / 6, (other[0] + 0.5 * other[1]) / 1.5);
  CHECK(audio::separate(torch::zeros({2, 0}), ensemble).sizes() == torch::IntArrayRef({3, 2, 0}));
}

TEST_CASE("models of an ensemble are in evaluation mode while it lives") {
  Probe model;
  model->train();
  {
    const audio::Ensemble ensemble{.members = {{.model = audio::segment_model(model),
                                                .options = {.segments = {.length = 4}, .stems = 1},
                                                .stems = {"other"}}}};
    CHECK_FALSE(model->is_training());
    CHECK(torch::allclose(audio::separate(torch::ones({2, 10}), ensemble), torch::full({1, 2, 10}, 2.)));
  }
  CHECK(model->is_training());
}

TEST_CASE("an ensemble says what can't be combined") {
  const auto error = [](auto change) {
    audio::Ensemble ensemble = three_models();
    change(ensemble);
    const Error error = error_of([&] { audio::separate(torch::zeros({2, 5}), ensemble); });
    CHECK(error.id() == "headroom.audio.ensemble.options");
    return std::string(error.what());
  };
  using Catch::Contains;
  CHECK_THAT(error([](auto& e) { e.members.clear(); }), Contains("got no models"));
  CHECK_THAT(error([](auto& e) { e.members[1].options.channels = 1; }), Contains("got models of 2 and of 1 channels"));
  CHECK_THAT(error([](auto& e) { e.members[1].stems.pop_back(); }), Contains("got 2 names for the 3 stems"));
  CHECK_THAT(error([](auto& e) { e.members[0].stems[1] = "vocals"; }), Contains("two stems with the name vocals"));
  CHECK_THAT(error([](auto& e) { e.members[0].weights = {1}; }), Contains("got 1 weights for the 2 stems"));
  CHECK_THAT(error([](auto& e) { e.members[0].weights = {1, 0}; }), Contains("got a weight of 0"));
  CHECK_THAT(error([](auto& e) {
               e.members[0].weights = {1, 1};
               e.combination.statistic = core::Statistic::max;
             }),
             Contains("none with a median, min or max"));
}

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
// Highest bytes in use beyond those before, over a recording of so many blocks of 6000 samples.
template <class Make>
std::size_t peak_of(int blocks, Make&& make) {
  const auto in_use = [] {
    const auto info = mallinfo2();
    return info.uordblks + info.hblkhd;
  };
  const torch::Tensor block = torch::randn({2, 6000});
  const std::size_t before = in_use();
  std::size_t peak = before;
  {
    const auto stream = make([&] { peak = std::max(peak, in_use()); });
    for (int i = 0; i < blocks; ++i) {
      stream->push(Eigen::Map<const audio::Samples>(block.data_ptr<float>(), 2, 6000));
    }
    stream->finish();
  }
  return peak - before;
}

TEST_CASE("shifts, batches and ensembles take the memory that is stated, however long the recording") {
  const SeparatorOptions options{
      .segments = core::like_msst(4000, 4), .batch = 3, .stems = 2, .test_time = {.shifts = 2}};
  const auto model = [](const torch::Tensor& x) { return torch::stack({x, x}, 1); };
  const auto stream = [&](const auto& sample) {
    return std::make_unique<audio::SeparatorStream>(model, options, [=](const audio::SamplesRef&) { sample(); });
  };
  // The recording [2, 2 · S], sums [5, S], for each of 3 segments in [2, S] and out [4, S], the window [S]; and what
  // one shift is ahead [4, 11 / 4 · S].
  const std::size_t state = 2 * 4 * 4000 * (2 * 2 + 5 + 3 * 6 + 1 + 4 * 11 / 4);
  CHECK(audio::SeparatorStream::state_bytes(options) == state);
  peak_of(1, stream);  // what LibTorch sets up once
  const std::size_t once = peak_of(2, stream), ten_times = peak_of(20, stream);
  CHECK(once >= state);
  CHECK(once < state + (64 << 10));
  CHECK(ten_times < once + (16 << 10));

  for (const auto domain : {core::Domain::waveform, core::Domain::spectrum}) {
    audio::Ensemble ensemble{.combination = {core::Statistic::max, domain}};
    for (const std::int64_t segment : {4000, 1000}) {
      ensemble.members.push_back({.model = model,
                                  .options = {.segments = core::like_demucs(segment), .stems = 2},
                                  .stems = {"vocals", "other"}});
    }
    const auto stream = [&](const auto& sample) {
      return std::make_unique<audio::EnsembleStream>(ensemble, [=](const audio::SamplesRef&) { sample(); });
    };
    peak_of(1, stream);
    const std::size_t state = audio::EnsembleStream::state_bytes(ensemble);
    const std::size_t once = peak_of(2, stream), ten_times = peak_of(20, stream);
    CHECK(once >= state);
    CHECK(once < state + 8 * (128 << 10));  // frames and spectra of 2 models, 2 stems, 2 channels
    CHECK(ten_times < once + (16 << 10));
  }
}
#endif

TEST_CASE("separate says what does not fit") {
  const SeparatorOptions options{.segments = {.length = 64}, .stems = 3};
  const auto cut = [](const torch::Tensor& x) { return scale(x).narrow(3, 0, 60); };
  const Error error = error_of([&] { audio::separate(torch::zeros({2, 5}), cut, options); });
  CHECK(error.id() == "headroom.audio.separator.model");
  CHECK_THAT(error.what(), Catch::Contains("[1, 3, 2, 60]") && Catch::Contains("[1, 3, 2, 64]"));
  CHECK(error_of([&] {
          audio::separate(torch::zeros({2, 5}), scale, {.stems = 0});
        }).id() == "headroom.audio.separator.options");
  CHECK(error_of([&] {
          audio::separate(torch::zeros({3, 5}), scale, options);
        }).id() == "headroom.audio.separator.source");
  CHECK(error_of([&] { audio::separate(torch::zeros({5}), scale, options); }).id() ==
        "headroom.audio.separator.source");
}
