#include "headroom/core/bsseval.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using core::BssOptions;
using core::BssScores;
using Eigen::Index;
using Eigen::MatrixXd;

namespace {

struct Signals {
  MatrixXd references, estimates;  // [sources x channels, samples]

  Signals part(Index begin, Index samples) const {
    return {references.middleCols(begin, samples), estimates.middleCols(begin, samples)};
  }
};

/// The signals of bsseval_reference.py.
Signals signals(Index sources, Index channels, Index samples) {
  std::uint64_t state = 12345;
  const auto noise = [&] {
    MatrixXd values(sources * channels, samples);
    for (Index t = 0; t < samples; ++t) {
      for (Index row = 0; row < values.rows(); ++row) {
        state = (1103515245 * state + 12345) % (std::uint64_t{1} << 31);
        values(row, t) = static_cast<double>((state >> 16) % 201) - 100;
      }
    }
    return values;
  };
  MatrixXd references = noise();
  for (Index t = samples; t-- > 1;) references.col(t) += references.col(t - 1);
  MatrixXd estimates = 2 * references + noise();
  for (Index row = 0; row < references.rows(); ++row) {
    const Index source = row / channels, other = source * channels + channels - 1 - row % channels;
    estimates.row(row).tail(samples - 3) += references.row(other).head(samples - 3);
    for (Index s = 0; s < sources; ++s) {
      if (s != source) estimates.row(row) += references.row(s * channels + row % channels);
    }
  }
  return {references, estimates};
}

/// Mostly low frequencies, as music has them: sums over 32 samples of sums over 32 samples.
MatrixXd coloured(const MatrixXd& signals) {
  MatrixXd low = signals;
  for (int pass = 0; pass < 2; ++pass) {
    const MatrixXd before = low;
    for (Index t = 0; t < low.cols(); ++t) {
      const Index count = std::min<Index>(t + 1, 32);
      low.col(t) = before.middleCols(t + 1 - count, count).rowwise().sum();
    }
  }
  return 1000 * low + signals;
}

/// Both readings, in blocks of some length.
std::vector<core::BssFrame> frames(const Signals& track, const BssOptions& options, Index block) {
  const auto read = [&](auto& reader) {
    for (Index begin = 0; begin < track.references.cols(); begin += block) {
      const Signals part = track.part(begin, std::min(block, track.references.cols() - begin));
      reader.add(part.references, part.estimates);
    }
  };
  core::BssCorrelations correlations(options);
  read(correlations);
  core::BssFrames scores{core::BssFilters(correlations)};
  read(scores);
  return scores.finish();
}

/// Scores frame by frame and in each source by source, empty for a frame without.
void check_scores(const std::vector<core::BssFrame>& found, const std::vector<std::vector<BssScores>>& expected,
                  double margin = 1e-8) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t t = 0; t < found.size(); ++t) {
    REQUIRE(found[t].has_value() == !expected[t].empty());
    for (std::size_t source = 0; source < expected[t].size(); ++source) {
      INFO("frame " << t << ", source " << source);
      const BssScores &is = (*found[t])[source], &wanted = expected[t][source];
      for (double BssScores::*score : {&BssScores::sdr, &BssScores::isr, &BssScores::sir, &BssScores::sar}) {
        CHECK(is.*score == Approx(wanted.*score).margin(margin).epsilon(0));
      }
    }
  }
}

const BssOptions kOptions{.sources = 3, .channels = 2, .window = 300, .hop = 200, .filter_length = 8};

// What bsseval_reference.py prints
const std::vector<std::vector<BssScores>> kStereo = {
    {{-6.3014225093, -3.1858426942, 3.9556680645, 11.6432349583},
     {-6.1410599714, -3.5418962413, 4.7858579529, 11.6876435486},
     {-6.6962819798, -3.2102677239, 4.1258853933, 11.3901231436}},
    {{-7.0891042673, -2.9740855582, 3.2873333560, 12.0900605600},
     {-6.2414994775, -3.2935859549, 4.7900009778, 12.1475663149},
     {-6.7549500366, -3.1942086779, 3.9578757523, 11.3532721907}},
    {{-6.5073454723, -3.0799442142, 4.2681877827, 11.8778430925},
     {-6.6314598939, -3.5478779032, 4.3629728001, 11.7591203536},
     {-6.4515039513, -3.2252377836, 3.9489232119, 11.2652917345}},
    {{-6.3367014868, -3.1169596017, 3.8263957150, 11.9064581762},
     {-6.3801995988, -3.4316241809, 4.8476760077, 11.6909493874},
     {-6.6437317743, -2.8394027224, 3.1217881758, 11.1115017261}},
};
const std::vector<std::vector<BssScores>> kShort = {
    {{-6.1815364524, -2.8280811370, 4.0711320851, 12.4354468971},
     {-6.2032377537, -3.0573445620, 4.4547951214, 11.8295915745},
     {-6.5709811469, -3.4003423944, 4.3828376911, 12.1207388507}},
};
const std::vector<std::vector<BssScores>> kSilence = {
    {{-6.3014225093, -3.1858426942, 5.1234516546, 8.4542481677},
     {-9.5075670734, -3.6711111390, 2.4161169383, 3.0411600953},
     {-6.6962819798, -3.2102677239, 4.9474447457, 8.4853713942}},
    {},
    {{-6.5073454723, -3.0799442142, 4.7603952053, 9.1449194420},
     {-9.3568951106, -3.9793690258, 2.5561167940, 4.4849174023},
     {-6.4515039513, -3.2252377836, 5.0845647498, 9.0340899934}},
    {{-6.3367014868, -3.1169596017, 3.8035922731, 11.8612789066},
     {-6.3801995988, -3.5342317997, 4.6523026825, 11.5437146706},
     {-6.6437317743, -2.8394027224, 3.0982632918, 11.1837459066}},
};
const std::vector<std::vector<BssScores>> kEqualChannels = {
    {{-8.0491750143, -2.6767849673, 4.3248498174, 0.0547375283},
     {-8.3300989389, -2.1901521524, 3.3921651750, -0.1359035801},
     {-7.5603225074, -0.5054297267, 2.7352401773, -0.3598448746}},
    {{-8.7133043895, -2.5276652484, 4.0085849830, -0.2973506046},
     {-8.4824073006, -1.7997216827, 3.4863293780, -0.2531994266},
     {-8.2419323264, -0.3161517895, 2.1422304288, -0.8508293620}},
};
const std::vector<std::vector<BssScores>> kColoured = {
    {{-9.2337344233, 2.8299982154, -2.7937189082, 1.7234081405},
     {-5.0064593251, -3.2374085644, 6.0824348007, 7.4298274538}},
    {{-1.9857056756, 2.5821074296, 1.2187828377, 4.1913531339},
     {-5.8647306186, -3.7979176987, 3.8825927906, 8.0840153743}},
};

}  // namespace

TEST_CASE("scores of frames are museval's, whatever the blocks") {
  const Signals track = signals(3, 2, 1000);
  for (const Index block : {1000, 7, 333}) check_scores(frames(track, kOptions, block), kStereo);
  check_scores(frames(track.part(0, 250), kOptions, 1000), kShort);  // one frame, though the window is longer
}

TEST_CASE("a frame in which a source is silent has no scores, and the median leaves it out") {
  Signals track = signals(3, 2, 1000);
  track.references.middleRows(2, 2).middleCols(200, 300).setZero();
  const auto found = frames(track, kOptions, 100);
  check_scores(found, kSilence);
  CHECK(core::median_scores(found, 0)->sdr == Approx(-6.3367014868));
  CHECK(core::median_scores(found, 1)->sar == Approx(4.4849174023));
  track.estimates.row(0) = -track.estimates.row(1);  // museval takes it for silent, too
  CHECK_FALSE(core::median_scores(frames(track, kOptions, 100), 0).has_value());
  CHECK(core::median({}) == std::nullopt);
  CHECK(core::median({4, 1, 3, 2}) == 2.5);
}

TEST_CASE("sources that are filtered copies of each other have the scores of a least-squares fit") {
  Signals track = signals(3, 2, 1000);
  track.references.middleRows(2, 2).middleCols(200, 300).setZero();
  for (Index source = 0; source < 3; ++source) track.references.row(2 * source + 1) = track.references.row(2 * source);
  BssOptions options = kOptions;
  options.filter_length = 4;
  check_scores(frames(track.part(500, 500), options, 100), kEqualChannels);
}

TEST_CASE("equal channels of sources with weak high frequencies have museval's scores") {
  Signals track = signals(2, 2, 1000);
  track.estimates = coloured(track.estimates) + 1000 * track.estimates;
  track.references = coloured(track.references);
  track.references.row(1) = track.references.row(0);
  const BssOptions options{.sources = 2, .channels = 2, .window = 500, .hop = 500, .filter_length = 24};
  check_scores(frames(track, options, 100), kColoured, 1e-6);
}

TEST_CASE("a track that is silent, or an estimate that is perfect, is no crash") {
  Signals track = signals(2, 1, 500);
  const BssOptions options{.sources = 2, .channels = 1, .window = 100, .hop = 150, .filter_length = 1};
  track.estimates = track.references;
  const auto perfect = frames(track, options, 500);
  CHECK(perfect.size() == 3);  // a hop above the window leaves samples out
  CHECK((*perfect[0])[0].sdr > 200);
  track.references.setZero(), track.estimates.setZero();
  CHECK_FALSE(frames(track, options, 500)[0].has_value());
}

TEST_CASE("scores have the same bits for any number of threads", "[threads]") {
  const Signals track = signals(3, 2, 1000);
  const auto scored = [&](const auto& executor) {
    core::BssCorrelations correlations(kOptions, executor);
    correlations.add(track.references, track.estimates);
    core::BssFrames found(core::BssFilters(correlations), executor);
    found.add(track.references, track.estimates);
    return found.finish();
  };
  const auto expected = scored(core::SerialExecutor());
#ifdef _OPENMP
  for (const int threads : {1, 2, 5}) {
    const auto found = scored(core::OpenMpExecutor{threads});
    for (std::size_t t = 0; t < expected.size(); ++t) {
      for (std::size_t source = 0; source < 3; ++source) {
        CHECK((*found[t])[source].isr == (*expected[t])[source].isr);
        CHECK((*found[t])[source].sar == (*expected[t])[source].sar);
      }
    }
  }
#endif
  check_scores(expected, kStereo);
}

TEST_CASE("blocks and options of another shape are refused") {
  CHECK(testing::error_of([] { core::BssCorrelations({.sources = 0}); }).id() == "headroom.core.bsseval.options");
  core::BssCorrelations correlations(kOptions);
  CHECK(testing::error_of([&] { correlations.add(MatrixXd::Zero(6, 5), MatrixXd::Zero(6, 4)); }).id() ==
        "headroom.core.bsseval.shape");
}
