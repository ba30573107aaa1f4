#include "headroom/audio/separate_file.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <array>

#include "headroom/audio/file.hpp"
#include "headroom/audio/recording_level.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using audio::SeparatorOptions;
using testing::error_of;
using testing::TemporaryFolder;

namespace {

// Stem n is the mixture times n + 1: a model that any cut and blend must leave alone.
torch::Tensor times(const torch::Tensor& mixture) {             // [1,C,S]
  return torch::stack({mixture, 2 * mixture, 3 * mixture}, 1);  // [1,3,C,S]
}

const std::array<std::string, 3> names = {"a.wav", "b.wav", "c.wav"};

// A file for each stem, and one for what the stems leave of the recording.
std::vector<audio::StemFile> with_residual(const TemporaryFolder& folder) {
  auto files = audio::one_file_a_stem({folder / names[0], folder / names[1], folder / names[2]});
  files.push_back({folder / "residual.wav", {-1, -1, -1}, 1});
  return files;
}

}  // namespace

TEST_CASE("a file becomes one file a stem; mono is separated as stereo of equal channels") {
  const TemporaryFolder folder;
  const auto outputs = audio::one_file_a_stem({folder / "a.wav", folder / "b.wav", folder / "c.wav"});
  for (const int channels : {1, 2}) {
    const torch::Tensor mixture = torch::rand({channels, 150000}) - 0.5;
    audio::write_audio(folder / "in.wav", mixture, 44100);
    std::vector<std::pair<std::int64_t, std::int64_t>> told;
    const auto clipped = audio::separate_file(
        audio::AudioReader(folder / "in.wav"), {outputs}, times, {.segments = {.length = 40000}, .stems = 3},
        [&](std::int64_t done, std::int64_t total) { told.emplace_back(done, total); });
    CHECK(clipped == 0);
    for (int n = 0; n < 3; ++n) {
      const audio::Recording stem = audio::read_audio(outputs[n].path);
      CHECK(stem.sample_rate == 44100);
      CHECK(torch::allclose(stem.samples, (n + 1) * mixture.expand({2, 150000}), 1e-6, 1e-6));
    }
    REQUIRE(told.size() == 5);  // 40000 + 4 · 30000 cover it
    CHECK(told.front() == std::pair<std::int64_t, std::int64_t>(30000, 150000));
    CHECK(told.back() == std::pair<std::int64_t, std::int64_t>(150000, 150000));
  }
  // Three times a sample beyond 1/3 is clipped in integers and counted.
  audio::write_audio(folder / "in.wav", torch::tensor({{0.2f, 0.4f, -0.6f}, {0.f, 0.f, 0.f}}), 44100);
  CHECK(audio::separate_file(audio::AudioReader(folder / "in.wav"), {outputs, 44100, audio::Encoding::pcm16}, times,
                             {.segments = {.length = 4}, .stems = 3}) == 3);
  CHECK(torch::allclose(audio::read_audio(outputs[2].path).samples[0], torch::tensor({0.6f, 1.f, -1.f}), 0, 1e-4));
}

TEST_CASE("an identity model returns the recording, borders included") {
  const TemporaryFolder folder;
  const auto identity = [](const torch::Tensor& mixture) { return mixture.unsqueeze(1); };
  for (const std::int64_t frames : {1, 5, 999, 1000, 1001, 70001}) {
    const torch::Tensor mixture = torch::rand({2, frames}) - 0.5;
    audio::write_audio(folder / "in.wav", mixture, 44100);
    audio::separate_file(audio::AudioReader(folder / "in.wav"), {audio::one_file_a_stem({folder / "out.wav"})},
                         identity, {.segments = {.length = 1000}, .stems = 1});
    CHECK(testing::largest_difference(audio::read_audio(folder / "out.wav").samples, mixture) <= 1e-6);
  }
}

TEST_CASE("a model at a recording's level gets it with mean 0 and deviation 1, and gives stems at that level") {
  const TemporaryFolder folder;
  const torch::Tensor mixture = 0.1 * torch::rand({2, 150001}) + 0.2, mono = mixture.mean(0).to(torch::kDouble);
  audio::write_audio(folder / "in.wav", mixture, 44100);
  audio::AudioReader recording(folder / "in.wav");
  const audio::Level level = audio::level_of(recording);
  CHECK(recording.position() == 0);
  CHECK(level.mean == Approx(mono.mean().item<double>()));
  CHECK(level.deviation == Approx(mono.std(/*unbiased=*/false).item<double>()));
  const auto squares = [](const torch::Tensor& x) { return x.square().unsqueeze(1); };
  audio::separate_file(std::move(recording), {audio::one_file_a_stem({folder / "out.wav"})}, squares,
                       {.segments = {.length = 40000}, .stems = 1, .level = level});
  const torch::Tensor expected = ((mixture - level.mean) / level.deviation).square() * level.deviation + level.mean;
  CHECK(torch::allclose(audio::read_audio(folder / "out.wav").samples, expected, 1e-5, 1e-6));
  audio::write_audio(folder / "in.wav", torch::zeros({2, 100}), 44100);
  audio::AudioReader silence(folder / "in.wav");
  CHECK((audio::level_of(silence).mean == 0 && audio::level_of(silence).deviation == 1));
}

TEST_CASE("channels reach the model as one, as copies or in groups") {
  const TemporaryFolder folder;
  const auto stem_of = [&](const torch::Tensor& mixture, std::int64_t channels) {
    const auto model = [&](const torch::Tensor& x) {
      CHECK(x.size(1) == channels);
      return (x + x.mean(1, true)).unsqueeze(1);  // the channels of a group see each other
    };
    audio::write_audio(folder / "in.wav", mixture, 44100);
    audio::separate_file(audio::AudioReader(folder / "in.wav"), {audio::one_file_a_stem({folder / "out.wav"})}, model,
                         {.segments = {.length = 64}, .channels = channels, .stems = 1});
    return audio::read_audio(folder / "out.wav").samples;
  };
  const torch::Tensor x = torch::rand({6, 200}) - 0.5;
  const torch::Tensor pairs =
      torch::cat({x[0] + x[1], x[0] + x[1], x[2] + x[3], x[2] + x[3], x[4] + x[5], x[4] + x[5]});
  CHECK(torch::allclose(stem_of(x, 2), x + pairs.view({6, 200}) / 2, 1e-6, 1e-6));
  CHECK(torch::allclose(stem_of(x, 6), x + x.mean(0, true), 1e-6, 1e-6));
  CHECK(torch::allclose(stem_of(x, 1), 2 * x.mean(0, true), 1e-6, 1e-6));
  CHECK(torch::allclose(stem_of(x.narrow(0, 0, 1), 2), 2 * x.narrow(0, 0, 1).expand({2, 200}), 1e-6, 1e-6));
}

TEST_CASE("a file of another sample rate is separated at the model's, and its stems have its own rate and length") {
  const TemporaryFolder folder;
  const auto time = torch::arange(60001, torch::kDouble) / 48000;
  const torch::Tensor mixture =
      torch::stack({(2000 * time).sin(), (9000 * time).cos()}).to(torch::kFloat) / 4;  // [2,T]
  audio::write_audio(folder / "in.wav", mixture, 48000);
  int segments = 0;
  const auto model = [&](const torch::Tensor& x) {
    ++segments;
    return times(x);
  };
  audio::separate_file(audio::AudioReader(folder / "in.wav"), {with_residual(folder), 44100}, model,
                       {.segments = {.length = 4000}, .stems = 3});
  CHECK(segments == 19);  // 4000 + 18 · 3000 cover ceil(60001·44100/48000) = 55126
  for (int n = 0; n < 3; ++n) {
    const audio::Recording stem = audio::read_audio(folder / names[n]);
    CHECK(stem.sample_rate == 48000);
    REQUIRE(stem.samples.sizes() == mixture.sizes());
    const torch::Tensor error = (stem.samples - (n + 1) * mixture).narrow(1, 2000, 56001).abs();
    CHECK(error.max().item<float>() < 1e-5);
  }
  // What the stems leave is taken from the file itself: nothing is lost
  torch::Tensor sum = audio::read_audio(folder / "residual.wav").samples;
  for (int n = 0; n < 3; ++n) sum = sum + audio::read_audio(folder / names[n]).samples;
  CHECK(testing::largest_difference(sum, mixture) < 1e-6);

  for (const auto& [frames, rate] : {std::pair{1, 8000}, {7, 192000}, {333, 44101}, {20000, 11025}}) {
    audio::write_audio(folder / "in.wav", torch::rand({1, frames}), rate);
    audio::separate_file(audio::AudioReader(folder / "in.wav"), {with_residual(folder)}, times,
                         {.segments = {.length = 1000}, .stems = 3});
    const audio::Recording stem = audio::read_audio(folder / "residual.wav");
    CHECK(stem.sample_rate == rate);
    CHECK(stem.samples.sizes() == torch::IntArrayRef({2, frames}));
  }
}

TEST_CASE("files hold sums of stems, and what they leave of the recording, as FLAC too") {
  const TemporaryFolder folder;
  const torch::Tensor mixture = torch::randint(-3000, 3000, {2, 100000}).to(torch::kFloat) / 32768;
  audio::write_audio(folder / "in.wav", mixture, 44100);
  const std::vector<audio::StemFile> files = {
      {folder / "b.flac", {0, 1, 0}}, {folder / "rest.flac", {1, 0, 1}}, {folder / "minus.flac", {0, -1, 0}, 1}};
  for (const auto encoding : {audio::Encoding::flac16, audio::Encoding::flac24}) {
    CHECK(audio::separate_file(audio::AudioReader(folder / "in.wav"), {files, 44100, encoding}, times,
                               {.segments = {.length = 30000}, .stems = 3}) == 0);
    const double step = encoding == audio::Encoding::flac16 ? 1.0 / 32768 : 2.0 / 8388608;
    for (const auto& [name, factor] : {std::pair{"b.flac", 2}, {"rest.flac", 4}, {"minus.flac", -1}}) {
      CHECK(testing::largest_difference(audio::read_audio(folder / name).samples, factor * mixture) <= step);
    }
  }
}

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a file ten times as long takes the same memory") {
  const TemporaryFolder folder;
  const auto peak_of = [&](std::int64_t frames, int rate = 44100) {
    {
      audio::AudioWriter writer(folder / "in.wav", {2, 44100, audio::Encoding::pcm16}, frames);
      for (std::int64_t done = 0; done < frames; done += 100000) {
        writer.write(torch::zeros({2, 100000}));
      }
      writer.close();
    }
    malloc_trim(0);
    std::size_t peak = 0;
    const auto sample = [&] {
      const auto info = mallinfo2();
      peak = std::max(peak, info.uordblks + info.hblkhd);
    };
    sample();
    const std::size_t before = peak;
    const auto model = [&](const torch::Tensor& x) {
      const torch::Tensor stems = times(x);
      sample();
      return stems;
    };
    audio::separate_file(audio::AudioReader(folder / "in.wav"), {with_residual(folder), rate, audio::Encoding::pcm16},
                         model, {.segments = {.length = 44100}, .stems = 3},
                         [&](std::int64_t, std::int64_t) { sample(); });
    return peak - before;
  };
  peak_of(100000);  // what LibTorch sets up once
  const std::size_t once = peak_of(400000), ten_times = peak_of(4000000);
  const std::size_t state =
      core::OverlapAdd<float>::state_bytes({.segments = {.length = 44100}, .in_channels = 2, .out_channels = 6});
  CHECK(once >= state);
  CHECK(once < 2 * state + (4 << 20));
  CHECK(ten_times < once + (64 << 10));  // ten times as long would be 44 MB more of samples alone
  const std::size_t resampled = peak_of(400000, 48000);
  CHECK(peak_of(1200000, 48000) < resampled + (64 << 10));
}
#endif

TEST_CASE("separate_file says what does not fit, and leaves no file") {
  const TemporaryFolder folder;
  const std::vector<std::filesystem::path> outputs = {folder / "a.wav", folder / "b.wav", folder / "c.wav"};
  const auto separate_error = [&](int channels, const std::vector<std::filesystem::path>& paths,
                                  const SeparatorOptions& options,
                                  const std::function<torch::Tensor(torch::Tensor)>& model) {
    audio::write_audio(folder / "in.wav", torch::zeros({channels, 100}), 44100);
    const Error error = error_of([&] {
      audio::separate_file(audio::AudioReader(folder / "in.wav"), {audio::one_file_a_stem(paths)}, model, options);
    });
    CHECK(folder.names() == std::vector<std::string>{"in.wav"});
    return error;
  };
  const SeparatorOptions options{.segments = {.length = 64}, .stems = 3};
  Error error = separate_error(5, outputs, options, times);
  CHECK(error.id() == "headroom.audio.separator.channels");
  CHECK_THAT(error.what(), Catch::Contains("has 5 channels, expected 1 or a multiple of the model's 2") &&
                               Catch::Contains("sox INPUT -c 2"));
  error = separate_error(2, {outputs[0]}, options, times);
  CHECK(error.id() == "headroom.audio.separator.outputs");
  error = separate_error(2, {outputs[0], outputs[1], outputs[0]}, options, times);
  CHECK_THAT(error.what(), Catch::Contains("a.wav") && Catch::Contains("two stems"));
  error = separate_error(2, {outputs[0], folder / "./in.wav", outputs[1]}, options, times);
  CHECK(error.id() == "headroom.audio.separator.outputs");
  CHECK_THAT(error.what(), Catch::Contains("is the input"));
  error = separate_error(2, outputs, options, [](const torch::Tensor& x) { return times(x) / 0.0; });
  CHECK(error.id() == "headroom.audio.file.not_finite");
  CHECK_THAT(error.what(), Catch::Contains("a.wav") && Catch::Contains("frame 0"));
  error = separate_error(2, outputs, {.segments = {.length = 0}, .stems = 3}, times);
  CHECK(error.id() == "headroom.core.segments.options");
  error = separate_error(2, {}, options, times);
  CHECK_THAT(error.what(), Catch::Contains("no file to write"));
}
