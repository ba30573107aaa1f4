#include <algorithm>
#include <cstdint>

#include "headroom/core/si_sdr.hpp"
#include "headroom/core/spectral_scores.hpp"
#include "support/catch.hpp"

// SI-SDR, L1-frequency, bleedless and fullness, against what scores_reference.py prints.

using namespace headroom;
using Eigen::Index;
using Eigen::MatrixXd;

namespace {

struct StereoStem {
  MatrixXd reference, estimate;  // [2, samples]
};

/// The signals of scores_reference.py.
StereoStem stereo_stem() {
  constexpr Index kSamples = 20000;
  std::uint64_t state = 12345;
  MatrixXd noise(4, kSamples);
  for (Index i = 0; i < noise.size(); ++i) {
    state = (1103515245 * state + 12345) % (std::uint64_t{1} << 31);
    noise.data()[i] = (static_cast<double>((state >> 16) % 201) - 100) / 128;
  }
  StereoStem stem{noise.topRows(2), noise.bottomRows(2) / 8};
  for (Index t = kSamples; t-- > 1;) stem.reference.col(t) += stem.reference.col(t - 1);
  stem.reference.middleCols(9000, 6000) /= 1024;
  stem.estimate += 0.75 * stem.reference;
  stem.estimate.rightCols(kSamples - 12000) /= 2;
  return stem;
}

/// In blocks of some length.
template <class Score>
void read_stem(const StereoStem& stem, Index block, Score& score) {
  for (Index begin = 0; begin < stem.reference.cols(); begin += block) {
    const Index count = std::min(block, stem.reference.cols() - begin);
    score.add(stem.reference.middleCols(begin, count), stem.estimate.middleCols(begin, count).cast<float>());
  }
}

}  // namespace

TEST_CASE("SI-SDR is that of Music-Source-Separation-Training") {
  const StereoStem stem = stereo_stem();
  for (const Index block : {20000, 123}) {
    core::SiSdrAccumulator score;
    read_stem(stem, block, score);
    CHECK(score.value() == Approx(9.7485485446).margin(1e-6).epsilon(0));
  }
  core::SiSdrAccumulator nothing, silence;
  silence.add(MatrixXd::Zero(2, 9), MatrixXd::Ones(2, 9));
  CHECK(nothing.value() == Approx(-80));
  CHECK(silence.value() == Approx(-80));
  CHECK(silence.reference_energy() == 0);
  CHECK(testing::error_of([&] { silence.add(MatrixXd::Zero(2, 9), MatrixXd::Ones(1, 9)); }).id() ==
        "headroom.core.si_sdr.shape");
}

TEST_CASE("the L1-frequency score is that of Music-Source-Separation-Training") {
  const StereoStem stem = stereo_stem();
  for (const Index block : {20000, 123}) {
    core::L1FrequencyScore score(2);
    read_stem(stem, block, score);
    CHECK(score.finish() == Approx(1.4275818305).epsilon(1e-6));
  }
  core::L1FrequencyScore brief(1), wrong(2);
  brief.add(MatrixXd::Ones(1, 1024), MatrixXd::Ones(1, 1024));
  CHECK(testing::error_of([&] { brief.finish(); }).id() == "headroom.core.frames.length");
  CHECK(testing::error_of([&] { wrong.add(MatrixXd::Ones(2, 9), MatrixXd::Ones(2, 8)); }).id() ==
        "headroom.core.spectral_scores.shape");
  CHECK(testing::error_of([&] { wrong.add(MatrixXd::Ones(1, 9), MatrixXd::Ones(1, 9)); }).id() ==
        "headroom.core.frames.shape");
}

TEST_CASE("bleedless and fullness are those of Music-Source-Separation-Training") {
  const StereoStem stem = stereo_stem();
  for (const Index block : {20000, 4097}) {
    core::MelPeaks peaks(2, 44100);
    read_stem(stem, block, peaks);
    peaks.finish();
    core::BleedFullnessScore score(peaks, 2, 44100);
    read_stem(stem, block, score);
    const core::BleedFullness found = score.finish();
    CHECK(found.bleedless == Approx(4.1993757704).epsilon(1e-5));
    CHECK(found.fullness == Approx(17.8709573475).epsilon(1e-5));
  }
  core::MelPeaks peaks(2, 44100);
  core::BleedFullnessScore equal(peaks, 2, 44100);
  equal.add(stem.reference, stem.reference);
  CHECK(equal.finish().bleedless == 100);
}

TEST_CASE("frames are those of torch.stft, at both ends") {
  for (const auto padding : {core::FramePadding::mirrored, core::FramePadding::zeros}) {
    const bool mirrored = padding == core::FramePadding::mirrored;
    for (const Index samples : {5, 8, 17}) {
      core::CenteredFrames frames(1, 8, 3, padding);
      Index count = 0;
      const auto check_frame = [&](const MatrixXd& frame) {
        for (Index i = 0; i < 8; ++i) {
          Index t = 3 * count - 4 + i;
          const bool inside = t >= 0 && t < samples;
          t = t < 0 ? -t : t >= samples ? 2 * (samples - 1) - t : t;
          CHECK(frame(i, 0) == (inside || mirrored ? static_cast<double>(t + 1) : 0));
        }
        ++count;
      };
      for (Index t = 0; t < samples; ++t) frames.add(MatrixXd::Constant(1, 1, static_cast<double>(t + 1)), check_frame);
      frames.finish(check_frame);
      CHECK(count == 1 + samples / 3);
    }
  }
  CHECK(testing::error_of([] { core::CenteredFrames(1, 7, 3, core::FramePadding::zeros); }).id() ==
        "headroom.core.frames.options");
}
