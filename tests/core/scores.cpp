#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "headroom/core/log_wmse.hpp"
#include "headroom/core/si_sdr.hpp"
#include "headroom/core/spectral_scores.hpp"
#include "headroom/core/track_scores.hpp"
#include "support/catch.hpp"

// SI-SDR, L1-frequency, bleedless and fullness, against what scores_reference.py prints; logWMSE, against
// log_wmse_reference.py; and all of them of a track.

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

namespace {

/// logWMSE of a stem in blocks of some length.
double log_wmse_of(const MatrixXd& mixture, const StereoStem& stem, Index block, double sample_rate = 44100) {
  core::HearingEnergy error(2, sample_rate), of_mixture(2, sample_rate);
  for (Index begin = 0; begin < mixture.cols(); begin += block) {
    const Index count = std::min(block, mixture.cols() - begin);
    error.add((stem.estimate - stem.reference).middleCols(begin, count));
    of_mixture.add(mixture.middleCols(begin, count));
  }
  return core::log_wmse(error.finish(), of_mixture.finish());
}

}  // namespace

TEST_CASE("logWMSE is that of torch-log-wmse") {
  StereoStem stem = stereo_stem();
  const MatrixXd mixture = stem.reference + stem.estimate;
  const auto close = [](double expected) { return Approx(expected).margin(2e-6).epsilon(0); };
  for (const Index block : {20000, 123}) CHECK(log_wmse_of(mixture, stem, block) == close(10.6763022263));
  CHECK(log_wmse_of(mixture, stem, 20000, 48000) == close(10.6863440515));
  CHECK(log_wmse_of(mixture, stem, 20000, 32000) == close(10.6417065857));
  CHECK(log_wmse_of(0 * mixture, stem, 20000) == close(-137.2703887427));
  const StereoStem brief{stem.reference.leftCols(10), stem.estimate.leftCols(10)};
  CHECK(log_wmse_of(mixture.leftCols(10), brief, 10) == close(15.1015778153));
  stem.reference.setZero();
  CHECK(log_wmse_of(mixture, stem, 20000) == close(7.3932020233));
  stem.estimate = stem.reference;
  CHECK(log_wmse_of(mixture, stem, 20000) == close(73.6827229758));
  CHECK(core::log_wmse(core::HearingEnergy(1, 44100).finish(), core::HearingEnergy(1, 44100).finish()) ==
        close(73.6827229758));
  CHECK(testing::error_of([] { core::HearingEnergy(0, 44100); }).id() == "headroom.core.log_wmse.options");
  CHECK(testing::error_of([] { core::HearingEnergy(2, 44100).add(MatrixXd::Zero(1, 9)); }).id() ==
        "headroom.core.log_wmse.shape");
  CHECK(testing::error_of([] { core::log_wmse(Eigen::ArrayXd::Ones(2), Eigen::ArrayXd::Ones(1)); }).id() ==
        "headroom.core.log_wmse.shape");
}

namespace {

/// A track of two mono sources, the channels of a stereo stem, in blocks of 1000 samples.
core::TrackScores score_both(const StereoStem& stem, const std::vector<std::string>& metrics) {
  const core::TrackOptions options{.sources = 2, .channels = 1, .sample_rate = 5000, .metrics = metrics};
  return core::score_track(options, [&](auto&& on_block) {
    for (Index begin = 0; begin < stem.reference.cols(); begin += 1000) {
      const MatrixXd references = stem.reference.middleCols(begin, 1000),
                     estimates = stem.estimate.middleCols(begin, 1000);
      on_block({references.cast<float>(), estimates.cast<float>(), references.colwise().sum().cast<float>()});
    }
  });
}

}  // namespace

TEST_CASE("all scores of a track are those of its parts, and what is silent is told") {
  StereoStem stem = stereo_stem();
  const std::vector<std::string> all(core::kMetrics.begin(), core::kMetrics.end());
  const core::TrackScores scores = score_both(stem, all);
  CHECK(scores.metrics.size() == all.size());
  CHECK(scores.frames.size() == 4);
  for (std::size_t source = 0; source < 2; ++source) {
    const MatrixXd s = stem.reference.row(static_cast<Index>(source)),
                   e = stem.estimate.row(static_cast<Index>(source));
    core::NsdrAccumulator nsdr;
    core::SiSdrAccumulator si_sdr;
    core::L1FrequencyScore l1_frequency(1);
    nsdr.add(s, e), si_sdr.add(s, e), l1_frequency.add(s, e);
    CHECK(*scores.metrics.at("nsdr")[source] == Approx(nsdr.value()).epsilon(1e-6));
    CHECK(*scores.metrics.at("si_sdr")[source] == Approx(si_sdr.value()).epsilon(1e-6));
    CHECK(*scores.metrics.at("l1_freq")[source] == Approx(l1_frequency.finish()).epsilon(1e-6));
    CHECK(*scores.metrics.at("sdr")[source] == core::median_scores(scores.frames, static_cast<Index>(source))->sdr);
    CHECK(*scores.metrics.at("bleedless")[source] > 0);
    CHECK_FALSE(scores.silent_reference[source]);
  }

  stem.reference.row(0).setZero(), stem.estimate.row(1).setZero();
  const core::TrackScores silent = score_both(stem, all);
  CHECK(silent.silent_reference == std::vector{true, false});
  CHECK(silent.silent_estimate == std::vector{false, true});
  CHECK(silent.metrics.at("nsdr") == std::vector<std::optional<double>>{std::nullopt, 0});
  CHECK_FALSE(silent.metrics.at("si_sdr")[0].has_value());
  CHECK_FALSE(silent.metrics.at("si_sdr")[1].has_value());
  CHECK_FALSE(silent.metrics.at("sir")[1].has_value());
  CHECK(silent.metrics.at("log_wmse")[0].has_value());
  CHECK(silent.metrics.at("fullness")[0] == 100);

  CHECK(score_both(stem, {"nsdr"}).metrics.size() == 1);
  CHECK(testing::error_of([&] { score_both(stem, {"sdri"}); }).id() == "headroom.core.track_scores.options");
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
