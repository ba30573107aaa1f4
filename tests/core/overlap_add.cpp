#include "headroom/core/overlap_add.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <limits>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using core::Borders;
using core::OverlapAdd;
using core::OverlapAddOptions;
using core::Segments;
using core::SegmentWindow;
using core::Tail;
using Eigen::Index;
using Block = OverlapAdd<double>::Block;
using ConstBlockRef = OverlapAdd<double>::ConstBlockRef;
using BlockRef = OverlapAdd<double>::BlockRef;

namespace {

// Values that differ from each other and from their neighbours, in [-1, 1].
Block recording(Index channels, Index length) {
  Block x(channels, length);
  for (Index c = 0; c < channels; ++c) {
    for (Index t = 0; t < length; ++t) {
      x(c, t) = std::sin(0.7 * static_cast<double>(t) + static_cast<double>(c)) + 1e-3 * static_cast<double>(t % 7);
    }
  }
  return x;
}

// Runs `model` over `x` in blocks of `block` samples and returns all that the sink was given.
Block stream(const OverlapAddOptions& options, const OverlapAdd<double>::Model& model, const Block& x, Index block) {
  std::vector<Block> parts;
  OverlapAdd<double> blend(options, model, [&](const ConstBlockRef& finished) { parts.push_back(finished); });
  for (Index t = 0; t < x.cols(); t += block) {
    blend.push(x.middleCols(t, std::min(block, x.cols() - t)));
  }
  blend.finish();
  Index length = 0;
  for (const Block& part : parts) {
    length += part.cols();
  }
  Block y(options.out_channels, length);
  Index t = 0;
  for (const Block& part : parts) {
    y.middleCols(t, part.cols()) = part;
    t += part.cols();
  }
  return y;
}

void identity(const ConstBlockRef& input, BlockRef output) { output = input; }

// The definition, on the whole recording in memory: Σ w·y / Σ w over the segments k = 0, 1, … that hold new samples.
template <class F>
Block blend_whole(const OverlapAddOptions& options, Index fade, F&& model, const Block& x) {
  const Index segment = options.segments.length, step = *options.segments.step, length = x.cols();
  Block sum = Block::Zero(options.out_channels, length), weights = Block::Zero(1, length);
  for (Index start = 0; start == 0 || start - step + segment < length; start += step) {
    Block input = Block::Zero(x.rows(), segment);
    const Index here = std::min(segment, length - start);
    input.leftCols(here) = x.middleCols(start, here);
    const Block output = model(input);
    for (Index i = 0; i < here; ++i) {
      const Index from_end = std::min(i, segment - 1 - i);
      const double w =
          fade < 2 ? 1 : std::clamp(static_cast<double>(from_end) / static_cast<double>(fade - 1), 1e-10, 1.);
      sum.col(start + i) += w * output.col(i);
      weights(start + i) += w;
    }
  }
  return sum.rowwise() / weights.row(0);
}

// A different result for each place in the segment and for each segment shows every weight; 3 rows from 2.
Block placed(const ConstBlockRef& input) {
  Block output(3, input.cols());
  double sum = 0;  // in this order wherever the input lies
  for (Index i = 0; i < input.cols(); ++i) sum += input(0, i);
  for (Index i = 0; i < input.cols(); ++i) {
    output.col(i) << input(0, i) * static_cast<double>(i), input(1, i) + sum, 1.0 / (1.0 + i);
  }
  return output;
}

// The same for a batch.
void placed_batch(const ConstBlockRef& input, BlockRef output) {
  for (Index n = 0; n < input.rows() / 2; ++n) output.middleRows(3 * n, 3) = placed(input.middleRows(2 * n, 2));
}

}  // namespace

TEST_CASE("overlap-add with the identity returns the recording, for every cut, window, length, batch and block") {
  const std::vector<SegmentWindow> windows = {SegmentWindow::triangle(),  SegmentWindow::triangle(3),
                                              SegmentWindow::trapezoid(), SegmentWindow::trapezoid(0),
                                              SegmentWindow::hamming(),   SegmentWindow::hann()};
  std::size_t turn = 0;
  for (const Index segment : {1, 2, 7, 12}) {
    for (Index step = 1; step <= segment; step += segment > 7 ? 5 : 2) {
      for (const auto borders : {Borders::none, Borders::reflect}) {
        for (const auto tail : {Tail::zero, Tail::reflect, Tail::move_back, Tail::centre}) {
          for (Index length = 0; length <= 41; ++length) {
            const Block x = recording(2, length);
            for (const Index block : {1, 3, 11, 64}) {
              const OverlapAddOptions options{.segments = {.length = segment,
                                                           .step = step,
                                                           .window = windows[++turn % windows.size()],
                                                           .borders = borders,
                                                           .tail = tail,
                                                           .lead = static_cast<Index>(turn % 5 == 0 ? turn % 23 : 0)},
                                              .batch = static_cast<Index>(1 + turn % 4)};
              const Block y = stream(options, identity, x, block);
              INFO("segment " << segment << ", step " << step << ", borders " << int(borders) << ", tail " << int(tail)
                              << ", length " << length << ", block " << block << ", turn " << turn);
              REQUIRE(y.cols() == length);
              if (length > 0) {
                REQUIRE((y - x).abs().maxCoeff() < 8 * std::numeric_limits<double>::epsilon());
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("overlap-add of a model that depends on the position equals the definition on the whole recording") {
  for (const Index segment : {8, 13}) {
    for (const Index step : {1, 3, 6, 8}) {
      for (const Index fade : {0, 1, 2, 4}) {
        for (const Index length : {1, 5, 8, 9, 13, 14, 31, 53}) {
          INFO("segment " << segment << ", step " << step << ", fade " << fade << ", length " << length);
          const OverlapAddOptions options{.segments = {.length = segment,
                                                       .step = step,
                                                       .window = SegmentWindow::trapezoid(fade),
                                                       .tail = Tail::zero},
                                          .out_channels = 3};
          const Block x = recording(2, length);
          const Block y = stream(options, placed_batch, x, 5), expected = blend_whole(options, fade, placed, x);
          REQUIRE(y.cols() == length);
          REQUIRE((y - expected).abs().maxCoeff() < 1e-12);
        }
      }
    }
  }
}

TEST_CASE("the last segment is padded with silence or with its mirror image") {
  Block x(1, 6);
  x << 1, 2, 3, 4, 5, 6;
  std::vector<Block> seen;
  const auto model = [&](const ConstBlockRef& input, BlockRef output) {
    seen.push_back(input);
    output = input;
  };
  const auto segments = [&](Index length, Index segment, Index step, Tail tail) {
    seen.clear();
    stream({.segments = {.length = segment, .step = step, .tail = tail}, .in_channels = 1, .out_channels = 1}, model,
           x.leftCols(length), 4);
    std::vector<std::vector<double>> values;
    for (const Block& s : seen) {
      values.emplace_back(s.data(), s.data() + s.size());
    }
    return values;
  };
  using Cut = std::vector<std::vector<double>>;
  CHECK(segments(6, 4, 3, Tail::zero) == Cut{{1, 2, 3, 4}, {4, 5, 6, 0}});
  CHECK(segments(6, 4, 3, Tail::reflect) == Cut{{1, 2, 3, 4}, {4, 5, 6, 5}});
  CHECK(segments(5, 4, 4, Tail::reflect) == Cut{{1, 2, 3, 4}, {5, 4, 3, 2}});
  CHECK(segments(3, 9, 3, Tail::reflect) == Cut{{1, 2, 3, 2, 1, 2, 3, 2, 1}});
  CHECK(segments(2, 5, 5, Tail::reflect) == Cut{{1, 2, 1, 2, 1}});
  CHECK(segments(1, 3, 2, Tail::reflect) == Cut{{1, 1, 1}});
  // A recording that full segments cover needs no padded one.
  CHECK(segments(6, 4, 2, Tail::zero) == Cut{{1, 2, 3, 4}, {3, 4, 5, 6}});
  CHECK(segments(4, 4, 1, Tail::zero) == Cut{{1, 2, 3, 4}});
  CHECK(segments(0, 4, 1, Tail::zero).empty());
  // Moved back to the end; between what came before and silence, as long as a segment reaches beyond the end.
  CHECK(segments(6, 4, 3, Tail::move_back) == Cut{{1, 2, 3, 4}, {3, 4, 5, 6}});
  CHECK(segments(3, 5, 3, Tail::move_back) == Cut{{1, 2, 3, 2, 1}});
  CHECK(segments(6, 4, 2, Tail::centre) == Cut{{1, 2, 3, 4}, {3, 4, 5, 6}, {4, 5, 6, 0}});
  CHECK(segments(2, 5, 4, Tail::centre) == Cut{{0, 1, 2, 0, 0}});
}

TEST_CASE("borders are the recording's mirror image, as many samples as two segments share") {
  std::vector<std::vector<double>> seen;
  const auto model = [&](const ConstBlockRef& input, BlockRef output) {
    seen.emplace_back(input.data(), input.data() + input.size());
    output = input;
  };
  Block x(1, 5);
  x << 1, 2, 3, 4, 5;
  const OverlapAddOptions options{
      .segments = {.length = 4, .step = 2, .borders = Borders::reflect}, .in_channels = 1, .out_channels = 1};
  using Cut = std::vector<std::vector<double>>;
  stream(options, model, x, 2);
  CHECK(seen == Cut{{3, 2, 1, 2}, {1, 2, 3, 4}, {3, 4, 5, 4}, {5, 4, 3, 4}});
  seen.clear();
  stream(options, model, x.leftCols(2), 1);  // shorter than a border
  CHECK(seen == Cut{{1, 2, 1, 2}, {1, 2, 1, 2}});
  seen.clear();
  stream(options, model, x.leftCols(1), 1);
  CHECK(seen == Cut{{1, 1, 1, 1}, {1, 1, 1, 1}});
}

TEST_CASE("any batch of segments gives the same bits, a last one that is not full too") {
  for (const auto tail : {Tail::reflect, Tail::move_back, Tail::centre}) {
    for (const Index length : {3, 40, 97}) {
      const Block x = recording(2, length);
      OverlapAddOptions options{.segments = {.length = 13, .step = 4, .tail = tail}, .out_channels = 3};
      const Block one = stream(options, placed_batch, x, 7);
      for (const Index batch : {2, 3, 50}) {
        options.batch = batch;
        CHECK((stream(options, placed_batch, x, 7) == one).all());
      }
    }
  }
}

TEST_CASE("silence in front moves where the recording is cut, and is taken off again") {
  const Block x = recording(2, 50);
  OverlapAddOptions options{.segments = {.length = 13, .step = 6, .borders = Borders::reflect}, .out_channels = 3};
  for (const Index lead : {1, 5, 13, 64}) {
    Block moved = Block::Zero(2, lead + 50);
    moved.rightCols(50) = x;
    options.segments.lead = 0;
    const Block expected = stream(options, placed_batch, moved, 9).rightCols(50);
    options.segments.lead = lead;
    CHECK((stream(options, placed_batch, x, 9) == expected).all());
  }
}

TEST_CASE("a sample is handed out as soon as no later segment covers it") {
  std::vector<Index> handed_out;
  OverlapAdd<double> blend({.segments = {.length = 8, .step = 3}, .in_channels = 1, .out_channels = 1}, identity,
                           [&](const ConstBlockRef& finished) { handed_out.push_back(finished.cols()); });
  const Block x = recording(1, 20);
  blend.push(x.leftCols(7));
  CHECK(handed_out.empty());
  blend.push(x.middleCols(7, 1));
  CHECK(handed_out == std::vector<Index>{3});
  blend.push(x.middleCols(8, 6));
  CHECK(handed_out == std::vector<Index>{3, 3, 3});
  blend.finish();
  CHECK(handed_out == std::vector<Index>{3, 3, 3, 5});
}

TEST_CASE("after finish, and after reset, overlap-add starts a recording from nothing") {
  Block y(1, 0);
  const auto append = [&](const ConstBlockRef& finished) {
    Block both(1, y.cols() + finished.cols());
    both << y, finished;
    y = both;
  };
  OverlapAdd<double> blend({.segments = {.length = 6, .step = 2}, .in_channels = 1, .out_channels = 1}, identity,
                           append);
  const Block first = recording(1, 11), second = recording(1, 9) + 3.0;
  blend.push(first);
  blend.reset();
  y.resize(1, 0);
  for (const Block& x : {first, second}) {
    y.resize(1, 0);
    blend.push(x);
    blend.finish();
    REQUIRE(y.cols() == x.cols());
    CHECK((y - x).abs().maxCoeff() < 1e-14);
  }
}

TEST_CASE("overlap and step are two ways to say the same") {
  CHECK(core::segment_step({.length = 441000}) == 330750);
  CHECK(core::segment_step({.length = 10, .overlap = 0}) == 10);
  CHECK(core::segment_step({.length = 10, .overlap = 0.999}) == 1);
  CHECK(core::segment_step({.length = 10, .overlap = 0.5, .step = 7}) == 7);
  for (const Index step : {1, 3, 98765, 441000}) {
    CHECK(core::segment_step({.length = 441000, .overlap = 1 - static_cast<double>(step) / 441000}) == step);
  }
}

TEST_CASE("single precision keeps a recording to 8 epsilon, with long segments and every window") {
  using Blend = OverlapAdd<float>;
  const Index length = 300007;
  const Blend::Block x = recording(1, length).cast<float>();
  for (const Segments& segments : {Segments{.length = 100000, .overlap = 0.75},
                                   {.length = 100000, .window = SegmentWindow::hann(), .borders = Borders::reflect},
                                   core::like_msst(100000, 4),
                                   core::like_demucs(100000, 0.25, 4),
                                   core::like_audio_separator(100000, 8)}) {
    Blend::Block y(1, length);
    Index written = 0;
    Blend blend(
        {.segments = segments, .in_channels = 1, .out_channels = 1},
        [](const Blend::ConstBlockRef& input, Blend::BlockRef output) { output = input; },
        [&](const Blend::ConstBlockRef& finished) {
          y.middleCols(written, finished.cols()) = finished;
          written += finished.cols();
        });
    blend.push(x);
    blend.finish();
    REQUIRE(written == length);
    CHECK(((y - x).abs() / x.abs().max(0.01f)).maxCoeff() < 8 * std::numeric_limits<float>::epsilon());
  }
}

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("overlap-add allocates its state and nothing more, however long the recording") {
  const auto in_use = [] {
    const auto info = mallinfo2();
    return info.uordblks + info.hblkhd;
  };
  const Index S = 50000;
  const auto check = [&](const OverlapAddOptions& options, std::size_t state) {
    const Block block = recording(2, 4096);
    std::size_t in_model = 0, in_sink = 0;
    const std::size_t before = in_use();
    OverlapAdd<double> blend(
        options,
        [&](const ConstBlockRef& input, BlockRef output) {
          in_model = std::max(in_model, in_use());
          for (Index i = 0; i < output.rows(); ++i) output.row(i) = input.row(i / 4);
        },
        [&](const ConstBlockRef&) { in_sink = std::max(in_sink, in_use()); });
    const std::size_t constructed = in_use();
    CHECK(OverlapAdd<double>::state_bytes(options) == state);
    CHECK(constructed - before >= state);
    CHECK(constructed - before < state + 8 * 8192);  // buffers in whole pages
    for (int i = 0; i < 200; ++i) {
      blend.push(block);
    }
    blend.finish();
    CHECK(in_model == constructed);
    CHECK(in_sink == constructed);
  };
  check({.segments = {.length = S}, .out_channels = 8}, 8 * (2 * 7 * S / 4 + 10 * S + 9 * S + S));
  check({.segments = core::like_msst(S, 4), .batch = 3, .out_channels = 8}, 8 * (2 * 2 * S + 3 * 10 * S + 9 * S + S));
}
#endif

TEST_CASE("overlap-add says which option is wrong") {
  const auto make = [](OverlapAddOptions options) {
    return testing::error_of([&] { OverlapAdd<float>(options, {}, {}); });
  };
  for (const auto& [segments, part] : std::vector<std::pair<Segments, const char*>>{
           {{}, "segment is 0"},
           {{.length = 10, .overlap = 1}, "overlap is 1"},
           {{.length = 10, .overlap = -0.1}, "overlap is -0.1"},
           {{.length = 10, .step = 11}, "step is 11"},
           {{.length = 10, .step = 0}, "step is 0"},
           {{.length = 10, .lead = -1}, "lead is -1"},
           {{.length = 10, .window = SegmentWindow::trapezoid(6)}, "fade is 6"},
           {{.length = 10, .window = SegmentWindow::triangle(0.5)}, "power of the window is 0.5"},
       }) {
    const Error error = make({.segments = segments});
    CHECK(error.id() == "headroom.core.segments.options");
    CHECK_THAT(error.what(), Catch::Contains(part));
  }
  for (const OverlapAddOptions& options : {OverlapAddOptions{.segments = {.length = 10}, .in_channels = 0},
                                           OverlapAddOptions{.segments = {.length = 10}, .batch = 0}}) {
    CHECK(make(options).id() == "headroom.core.overlap_add.options");
  }
  OverlapAdd<double> blend({.segments = {.length = 4}}, identity, [](const ConstBlockRef&) {});
  const Error error = testing::error_of([&] { blend.push(recording(1, 3)); });
  CHECK(error.id() == "headroom.core.overlap_add.channels");
  CHECK_THAT(error.what(), Catch::Contains("got a block of 1 channels, expected 2"));
}
