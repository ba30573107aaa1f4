// What core::like_msst and others make, against plain forms of what the tools do, on the whole recording in double.

#include "headroom/core/segments.hpp"

#include <Eigen/Core>
#include <cmath>
#include <functional>
#include <numbers>
#include <vector>

#include "headroom/core/lockstep.hpp"
#include "headroom/core/overlap_add.hpp"
#include "support/catch.hpp"

using namespace headroom;
using Eigen::ArrayXd;
using Eigen::Index;
using Block = core::OverlapAdd<double>::Block;
using ConstBlockRef = core::OverlapAdd<double>::ConstBlockRef;

namespace {

ArrayXd recording(Index length) {
  return ArrayXd::NullaryExpr(length, [](Index t) { return std::sin(0.7 * static_cast<double>(t)) + 0.01 * (t % 7); });
}

// Depends on the place in the segment and on all of the segment.
ArrayXd model(const ArrayXd& x) {
  return x * ArrayXd::LinSpaced(x.size(), 1, 2) + x.reverse().square() + x.sum() / static_cast<double>(x.size());
}

ArrayXd stream(const core::Segments& segments, const ArrayXd& x, Index batch) {
  ArrayXd y(x.size());
  Index done = 0;
  core::OverlapAdd<double> blend(
      {.segments = segments, .batch = batch, .in_channels = 1, .out_channels = 1},
      [](const ConstBlockRef& input, core::OverlapAdd<double>::BlockRef output) {
        for (Index n = 0; n < input.rows(); ++n) output.row(n) = model(input.row(n).transpose()).transpose();
      },
      [&](const ConstBlockRef& finished) {
        y.segment(done, finished.cols()) = finished.row(0).transpose();
        done += finished.cols();
      });
  blend.push(x.transpose());
  blend.finish();
  REQUIRE(done == x.size());
  return y;
}

// What is added up, and by what it is divided.
struct Sums {
  ArrayXd values, weights;
  explicit Sums(Index length) : values(ArrayXd::Zero(length)), weights(ArrayXd::Zero(length)) {}
  void add(Index at, const ArrayXd& y, const ArrayXd& w) {
    values.segment(at, y.size()) += y * w;
    weights.segment(at, y.size()) += w;
  }
  ArrayXd mean() const { return values / weights; }
};

// x mirrored at its last sample until it has `length`.
ArrayXd mirrored_to(const ArrayXd& x, Index length) {
  ArrayXd y(length);
  for (Index i = 0, at = 0, way = 1; i < length; ++i, at += way) {
    y(i) = x(at);
    if (x.size() == 1)
      way = 0;
    else if (at + way < 0 || at + way == x.size())
      way = -way;
  }
  return y;
}

ArrayXd msst(const ArrayXd& x, Index length, Index num_overlap) {
  const Index step = length / num_overlap, border = length - step, fade = length / 10, n = x.size() + 2 * border;
  ArrayXd extended(n);
  extended.tail(n - border) = mirrored_to(x, n - border);
  extended.head(border) = mirrored_to(x, border + 1).tail(border).reverse();
  Sums sums(n);
  for (Index start = 0; start < n; start += step) {
    const Index here = std::min(length, n - start);
    ArrayXd part = ArrayXd::Zero(length), window = ArrayXd::Ones(length);
    part.head(here) = extended.segment(start, here);
    if (here > length / 2) part = mirrored_to(part.head(here), length);
    if (start > 0) window.head(fade) = ArrayXd::LinSpaced(fade, 0, 1);
    if (start + step < n) window.tail(fade) = ArrayXd::LinSpaced(fade, 1, 0);
    sums.add(start, model(part).head(here), window.head(here));
  }
  return sums.mean().segment(border, x.size());
}

ArrayXd demucs(const ArrayXd& x, Index length, double overlap, double transition_power) {
  const auto step = static_cast<Index>((1 - overlap) * static_cast<double>(length));
  ArrayXd window(length);
  window << ArrayXd::LinSpaced(length / 2, 1, static_cast<double>(length / 2)),
      ArrayXd::LinSpaced(length - length / 2, static_cast<double>(length - length / 2), 1);
  window = (window / window.maxCoeff()).pow(transition_power);
  Sums sums(x.size());
  for (Index start = 0; start < x.size(); start += step) {
    const Index here = std::min(length, x.size() - start), before = (length - here) / 2;
    ArrayXd part(length);
    for (Index i = 0; i < length; ++i) {
      const Index t = start - before + i;
      part(i) = t >= 0 && t < x.size() ? x(t) : 0;
    }
    sums.add(start, model(part).segment(before, here), window.head(here));
  }
  return sums.mean();
}

ArrayXd audio_separator(const ArrayXd& x, Index length, Index num_overlap) {
  const Index step = length / num_overlap;
  const ArrayXd phase = ArrayXd::LinSpaced(length, 0, 2 * std::numbers::pi);
  const ArrayXd window = 0.54 - 0.46 * phase.cos();
  Sums sums(x.size());
  for (Index start = 0;; start += step) {
    const bool last = start + length >= x.size();
    if (last) start = x.size() - length;
    sums.add(start, model(x.segment(start, length)), window);
    if (last) break;
  }
  return sums.mean();
}

}  // namespace

TEST_CASE("like_msst cuts and blends as Music-Source-Separation-Training, also what is shorter than its borders") {
  for (const Index length : {20, 47}) {
    for (const Index num_overlap : {2, 3, 4, 7}) {
      for (const Index samples : {1, 2, 13, 19, 46, 93, 94, 95, 300, 1001}) {
        for (const Index batch : {1, 3}) {
          INFO("segment " << length << ", " << num_overlap << " overlap, " << samples << " samples, batch " << batch);
          const ArrayXd x = recording(samples);
          const ArrayXd y = stream(core::like_msst(length, num_overlap), x, batch);
          REQUIRE((y - msst(x, length, num_overlap)).abs().maxCoeff() < 1e-8);
        }
      }
    }
  }
}

TEST_CASE("like_demucs cuts and blends as demucs") {
  for (const Index length : {20, 47}) {
    for (const double overlap : {0.0, 0.1, 0.25, 0.5, 0.9}) {
      for (const double power : {1.0, 2.5}) {
        for (const Index samples : {1, 2, 13, 19, 46, 93, 94, 95, 300}) {
          INFO("segment " << length << ", overlap " << overlap << ", power " << power << ", " << samples << " samples");
          const ArrayXd x = recording(samples);
          const ArrayXd y = stream(core::like_demucs(length, overlap, power), x, 2);
          REQUIRE((y - demucs(x, length, overlap, power)).abs().maxCoeff() < 1e-12);
        }
      }
    }
  }
}

TEST_CASE("like_audio_separator cuts and blends as audio-separator; a short recording is mirrored") {
  for (const Index length : {20, 47}) {
    for (const Index num_overlap : {1, 2, 8}) {
      for (const Index samples : {47, 48, 93, 94, 95, 300}) {
        INFO("segment " << length << ", " << num_overlap << " overlap, " << samples << " samples");
        const ArrayXd x = recording(samples);
        const ArrayXd y = stream(core::like_audio_separator(length, num_overlap), x, 2);
        REQUIRE((y - audio_separator(x, length, num_overlap)).abs().maxCoeff() < 1e-12);
      }
    }
    for (const Index samples : {1, 2, 13, 19}) {
      const ArrayXd x = recording(samples);
      const ArrayXd y = stream(core::like_audio_separator(length, 4), x, 2);
      REQUIRE((y - model(mirrored_to(x, length)).head(samples)).abs().maxCoeff() < 1e-12);
    }
  }
}

TEST_CASE("presets say which number of overlaps makes no step") {
  CHECK(core::segment_step(core::like_msst(352800, 4)) == 88200);
  CHECK(core::segment_step(core::like_demucs(343980)) == 257985);
  CHECK(core::segment_step(core::like_audio_separator(131584)) == 16448);
  for (const Index num_overlap : {0, 11}) {
    const Error error = testing::error_of([&] { core::like_msst(10, num_overlap); });
    CHECK(error.id() == "headroom.core.segments.options");
    CHECK_THAT(error.what(), Catch::Contains("num_overlap is " + std::to_string(num_overlap) + ", expected 1 to"));
  }
}

TEST_CASE("lockstep hands on what every stream has, in order") {
  using Blocks = std::vector<Block>;
  std::vector<std::vector<double>> seen;
  core::Lockstep<double> lockstep({1, 2}, 6, [&](Blocks& streams, Index n) {
    for (Index i = 0; i < n; ++i) seen.push_back({streams[0](0, i), streams[1](0, i), streams[1](1, i)});
  });
  Block first(1, 5), second(2, 5);
  first << 1, 2, 3, 4, 5;
  second << 11, 12, 13, 14, 15, 21, 22, 23, 24, 25;
  lockstep.add(0, first.leftCols(4));
  CHECK(seen.empty());
  lockstep.add(1, second.leftCols(1));
  lockstep.add(1, second.middleCols(1, 4));
  lockstep.add(0, first.rightCols(1));
  CHECK(seen == std::vector<std::vector<double>>{{1, 11, 21}, {2, 12, 22}, {3, 13, 23}, {4, 14, 24}, {5, 15, 25}});
  CHECK(core::Lockstep<double>::state_bytes({1, 2}, 6) == 8 * 3 * 6);
}
