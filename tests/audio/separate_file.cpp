#include "headroom/audio/separate_file.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using audio::SeparatorOptions;
using testing::error_of;
using testing::TemporaryFolder;

namespace {

// Stem n is the mixture times n + 1: a model that any cut and blend must leave alone.
torch::Tensor scale(const torch::Tensor& mixture) {             // [1,C,S]
  return torch::stack({mixture, 2 * mixture, 3 * mixture}, 1);  // [1,3,C,S]
}

}  // namespace

TEST_CASE("a file becomes one file a stem; mono is separated as stereo of equal channels") {
  const TemporaryFolder folder;
  const std::vector<std::filesystem::path> outputs = {folder / "a.wav", folder / "b.wav", folder / "c.wav"};
  for (const int channels : {1, 2}) {
    const torch::Tensor mixture = torch::rand({channels, 150000}) - 0.5;
    audio::write_audio(folder / "in.wav", mixture, 44100);
    std::vector<std::pair<std::int64_t, std::int64_t>> told;
    const auto clipped = audio::separate_file(
        folder / "in.wav", outputs, scale, {.segments = {.length = 40000}, .stems = 3}, 44100, audio::Encoding::float32,
        [&](std::int64_t done, std::int64_t total) { told.emplace_back(done, total); });
    CHECK(clipped == 0);
    for (int n = 0; n < 3; ++n) {
      const audio::Recording stem = audio::read_audio(outputs[n]);
      CHECK(stem.sample_rate == 44100);
      CHECK(torch::allclose(stem.samples, (n + 1) * mixture.expand({2, 150000}), 1e-6, 1e-6));
    }
    REQUIRE(told.size() == 5);  // 40000 + 4 · 30000 cover it
    CHECK(told.front() == std::pair<std::int64_t, std::int64_t>(30000, 150000));
    CHECK(told.back() == std::pair<std::int64_t, std::int64_t>(150000, 150000));
  }
  // Three times a sample beyond 1/3 is clipped in integers and counted.
  audio::write_audio(folder / "in.wav", torch::tensor({{0.2f, 0.4f, -0.6f}, {0.f, 0.f, 0.f}}), 44100);
  CHECK(audio::separate_file(folder / "in.wav", outputs, scale, {.segments = {.length = 4}, .stems = 3}, 44100,
                             audio::Encoding::pcm16) == 3);
  CHECK(torch::allclose(audio::read_audio(outputs[2]).samples[0], torch::tensor({0.6f, 1.f, -1.f}), 0, 1e-4));
}

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a file ten times as long takes the same memory") {
  const TemporaryFolder folder;
  const auto peak_of = [&](std::int64_t frames) {
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
      const torch::Tensor stems = scale(x);
      sample();
      return stems;
    };
    audio::separate_file(folder / "in.wav", {folder / "a.wav", folder / "b.wav", folder / "c.wav"}, model,
                         {.segments = {.length = 44100}, .stems = 3}, 44100, audio::Encoding::pcm16,
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
}
#endif

TEST_CASE("separate_file says what does not fit, and leaves no file") {
  const TemporaryFolder folder;
  const std::vector<std::filesystem::path> outputs = {folder / "a.wav", folder / "b.wav", folder / "c.wav"};
  const auto separate_error = [&](int channels, int rate, const std::vector<std::filesystem::path>& paths,
                                  const SeparatorOptions& options,
                                  const std::function<torch::Tensor(torch::Tensor)>& model) {
    audio::write_audio(folder / "in.wav", torch::zeros({channels, 100}), rate);
    const Error error = error_of([&] { audio::separate_file(folder / "in.wav", paths, model, options, 44100); });
    CHECK(folder.names() == std::vector<std::string>{"in.wav"});
    return error;
  };
  const SeparatorOptions options{.segments = {.length = 64}, .stems = 3};
  Error error = separate_error(2, 48000, outputs, options, scale);
  CHECK(error.id() == "headroom.audio.file.sample_rate");
  error = separate_error(6, 44100, outputs, options, scale);
  CHECK(error.id() == "headroom.audio.separator.channels");
  CHECK_THAT(error.what(), Catch::Contains("has 6 channels, expected 1 or 2") && Catch::Contains("sox INPUT -c 2"));
  error = separate_error(2, 44100, {outputs[0]}, options, scale);
  CHECK(error.id() == "headroom.audio.separator.outputs");
  error = separate_error(2, 44100, {outputs[0], outputs[1], outputs[0]}, options, scale);
  CHECK_THAT(error.what(), Catch::Contains("a.wav") && Catch::Contains("two stems"));
  error = separate_error(2, 44100, {outputs[0], folder / "./in.wav", outputs[1]}, options, scale);
  CHECK(error.id() == "headroom.audio.separator.outputs");
  CHECK_THAT(error.what(), Catch::Contains("is the input"));
  error = separate_error(2, 44100, outputs, options, [](const torch::Tensor& x) { return scale(x) / 0.0; });
  CHECK(error.id() == "headroom.audio.file.not_finite");
  CHECK_THAT(error.what(), Catch::Contains("a.wav") && Catch::Contains("frame 0"));
  error = separate_error(2, 44100, outputs, {.segments = {.length = 0}, .stems = 3}, scale);
  CHECK(error.id() == "headroom.core.segments.options");
}
