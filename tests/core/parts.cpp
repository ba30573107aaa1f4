// The small parts of the attention kernel, each alone: vector functions, the register tile, packing, bfloat16 products,
// schedule, score terms, online softmax.

#include <Eigen/Core>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "headroom/core/attention/online_softmax.hpp"
#include "headroom/core/attention/schedule.hpp"
#include "headroom/core/bfloat16_product.hpp"
#include "support/catch.hpp"

using namespace headroom::core;
using namespace headroom::core::detail;

namespace {

template <class Scalar>
constexpr Index kLanes = simd::kLanes<Scalar>;

/// f of one number, by all lanes.
template <class Scalar, class F>
Scalar by_lanes(F&& f, double x) {
  Scalar lanes[simd::kLanes<Scalar>];
  simd::store(lanes, f(simd::broadcast(static_cast<Scalar>(x))));
  return lanes[0];
}

/// The largest error of f relative to the exact function, over numbers from first to last.
template <class Scalar, class F, class Exact>
double largest_error(F&& f, Exact&& exact, double first, double last) {
  double worst = 0;
  for (double x = first; x <= last; x += (last - first) / 30011) {
    const long double expected = exact(static_cast<long double>(static_cast<Scalar>(x)));
    const long double difference = std::abs(static_cast<long double>(by_lanes<Scalar>(f, x)) - expected);
    worst = std::max(worst, static_cast<double>(difference / std::abs(expected)));
  }
  return worst;
}

/// Whole numbers from -4 to 4: their products and sums are exact in every type.
template <class Scalar>
std::vector<Scalar> whole_numbers(Index count, unsigned seed = 3) {
  std::mt19937 generator(seed);
  std::vector<Scalar> x(count);
  for (Scalar& e : x) e = static_cast<Scalar>(static_cast<float>(static_cast<int>(generator() % 9) - 4));
  return x;
}

}  // namespace

TEST_CASE("powers of two are within the stated error of long double over the whole range, and 0 below it") {
  const auto exp2 = [](long double x) { return std::exp2(x); };
  const auto of_float = [](simd::Packet<float> x) { return simd::exp2<float>(x); };
  const auto of_double = [](simd::Packet<double> x) { return simd::exp2<double>(x); };
#ifdef __FMA__
  const double bound = 9e-8;
#else
  const double bound = 1e-7;
#endif
  CHECK(largest_error<float>(of_float, exp2, -126, 127) < bound);
  CHECK(largest_error<float>(of_float, exp2, -1, 1) < bound);
  CHECK(largest_error<double>(of_double, exp2, -1021, 127) < 3e-16);
  CHECK(largest_error<double>(of_double, exp2, -1, 1) < 3e-16);
  for (const double x : {-150.0, -151.0, -1e4, -3e38}) CHECK(by_lanes<float>(of_float, x) == 0);
  for (const double x : {-1080.0, -1e4, -1e300}) CHECK(by_lanes<double>(of_double, x) == 0);
  for (int n = -126; n <= 127; ++n) {  // whole powers are exact
    CHECK(by_lanes<float>(of_float, n) == std::ldexp(1.0F, n));
    CHECK(by_lanes<double>(of_double, n) == std::ldexp(1.0, n));
  }
}

TEST_CASE("tanh is within the stated error of long double over the whole range") {
  const auto tanh = [](long double x) { return std::tanh(x); };
  const auto of_float = [](simd::Packet<float> x) { return simd::tanh<float>(x); };
  const auto of_double = [](simd::Packet<double> x) { return simd::tanh<double>(x); };
  for (const double side : {-1.0, 1.0}) {
    for (const double bound : {1e-3, 0.7, 20.0}) {
      CAPTURE(side, bound);
      const double first = std::min(side * bound, side * bound / 1e6),
                   last = std::max(side * bound, side * bound / 1e6);
      CHECK(largest_error<float>(of_float, tanh, first, last) < 2e-7);
      CHECK(largest_error<double>(of_double, tanh, first, last) < 3e-16);
    }
    for (const double x : {10.0, 1e5, 3e38}) CHECK(by_lanes<float>(of_float, side * x) == static_cast<float>(side));
  }
  CHECK(by_lanes<float>(of_float, 0) == 0);
}

namespace {

/// A register tile of Rows x Vectors against plain loops; `a` is stored by rows or by columns.
template <class Scalar, int Rows, int Vectors>
bool register_tile_is_exact(bool by_columns) {
  constexpr Index depth = 7, width = Vectors * kLanes<Scalar>;
  const auto a = whole_numbers<Scalar>(Rows * depth), b = whole_numbers<Scalar>(depth * width, 5);
  const Index row = by_columns ? 1 : depth, column = by_columns ? Rows : 1;
  RegisterTile<Scalar, Rows, Vectors> tile({a.data(), row, column}, {b.data(), width}, depth);
  bool exact = true;
  tile.for_each([&](int r, int v, simd::Packet<Scalar> packet) {
    Scalar lanes[simd::kLanes<Scalar>];
    simd::store(lanes, packet);
    for (Index l = 0; l < kLanes<Scalar>; ++l) {
      Scalar sum = 0;
      for (Index k = 0; k < depth; ++k) sum += a[r * row + k * column] * b[k * width + v * kLanes<Scalar> + l];
      exact &= lanes[l] == sum;
    }
  });
  return exact;
}

}  // namespace

TEST_CASE("a register tile is the product of its operands") {
  for (const bool by_columns : {false, true}) {
    CHECK(register_tile_is_exact<float, 1, 1>(by_columns));
    CHECK(register_tile_is_exact<float, kTileRows, kTileVectors>(by_columns));
    CHECK(register_tile_is_exact<double, kTileRows - 1, kTileVectors>(by_columns));
  }
}

TEST_CASE("rows are split into register tiles without a gap, none much smaller than the others") {
  for (Index count = 0; count <= 5 * kTileRows; ++count) {
    CAPTURE(count);
    Index next = 0;
    bool fits = true;
    int smallest = kTileRows;
    for_row_tiles<kTileRows>(count, [&]<int Rows>(Index row) {
      fits &= row == next && Rows <= kTileRows;
      smallest = std::min(smallest, Rows);
      next += Rows;
    });
    CHECK(fits);
    CHECK(next == count);
    if (count >= kTileRows) CHECK(smallest >= kTileRows / 2);
  }
}

TEST_CASE("rows come into lanes and back, whichever side is contiguous; other lanes are left alone") {
  constexpr Index cols = 2 * kLanes<float> + 3, width = 3 * kLanes<float>;
  for (const Index rows : {Index(1), kLanes<float>, 2 * kLanes<float> + 1}) {
    for (const std::array<Index, 2>& strides :
         {std::array<Index, 2>{cols, 1}, {1, rows}, {2 * cols, 2}, {Index(0), Index(1)}}) {
      CAPTURE(rows, strides);
      const auto x = whole_numbers<float>(2 * rows * cols);
      const MatrixView<const float> view{x.data(), rows, cols, strides[0], strides[1]};
      std::vector<float> lanes(cols * width, 1.0F), back(rows * cols);
      pack_lanes(lanes.data(), width, view, TimesPlus<float>{2});
      bool right = true;
      for (Index d = 0; d < cols; ++d) {
        for (Index l = 0; l < width; ++l) right &= lanes[d * width + l] == (l < rows ? 2 + view(l, d) : 1);
      }
      CHECK(right);
      const std::vector<float> factor(width, 0.5F);
      for (const MatrixView<float>& y :
           {MatrixView<float>{back.data(), rows, cols, cols, 1}, {back.data(), rows, cols, 1, rows}}) {
        unpack_lanes(y, lanes.data(), width, factor.data());
        for (Index i = 0; i < rows; ++i) {
          for (Index d = 0; d < cols; ++d) right &= y(i, d) == 1 + view(i, d) / 2;
        }
      }
      CHECK(right);
    }
  }
}

namespace {

/// A matrix of bfloat16 [rows][cols], and in the forms of its products: padded rows, VNNI lanes.
struct Bfloat16Matrix {
  Index rows, cols, stride;
  std::vector<Eigen::bfloat16> x, padded_rows;
  std::vector<VnniPair> lanes;  // [stride/2][rows]

  Bfloat16Matrix(Index r, Index c, unsigned seed) : rows(r), cols(c), stride(padded(c, kVnniDepth)) {
    x = whole_numbers<Eigen::bfloat16>(rows * cols, seed);
    padded_rows.resize(padded(rows, kVnniRows) * stride, Eigen::bfloat16(7.0F));
    copy_bfloat16_rows(padded_rows.data(), padded(rows, kVnniRows), stride, stored(), 1);
    lanes.resize(stride / 2 * rows);
    pack_vnni_lanes(lanes.data(), rows, view());
  }
  StoredMatrix stored() { return {x.data(), StoredType::bfloat16, rows, cols, cols, 1}; }
  MatrixView<const Eigen::bfloat16> view() const { return {padded_rows.data(), rows, stride, stride, 1}; }
  float operator()(Index r, Index c) const { return r < rows && c < cols ? static_cast<float>(x[r * cols + c]) : 0; }
};

/// c = a·bᵀ and c += a·bᵀ, b in lanes.
template <int Vectors>
bool bfloat16_product_is_exact() {
  const Index width = Vectors * kLanes<float>;
  const Bfloat16Matrix a(40, 50, 3), b(width, 50, 5);
  const Index rows = padded(a.rows, kVnniRows);
  std::vector<float> c(rows * width, 9.0F);
  const VnniProduct product{a.padded_rows.data(), a.stride, b.lanes.data(), width, rows, a.stride / 2, c.data(), width};
  bool exact = true;
  const auto check = [&](float times) {
    for (Index r = 0; r < rows; ++r) {
      for (Index l = 0; l < width; ++l) {
        float sum = 0;
        for (Index k = 0; k < a.cols; ++k) sum += a(r, k) * b(l, k);
        exact &= c[r * width + l] == times * sum;
      }
    }
  };
  multiply<Vectors, false>(product), check(1);
  multiply<Vectors, true>(product), check(2);
  return exact;
}

}  // namespace

TEST_CASE("bfloat16 products are exact where no sum is rounded") {
  if (!kHasBfloat16Products || !AmxTiles::available()) return;
  const AmxTiles amx;
  CHECK(bfloat16_product_is_exact<1>());
  CHECK(bfloat16_product_is_exact<2>());
  CHECK(bfloat16_product_is_exact<3>());
}

TEST_CASE("rows of bfloat16 are padded with zeros, negated, transposed and brought into VNNI layout") {
  Bfloat16Matrix m(21, 40, 3);
  const Index rows = padded(m.rows, kVnniRows);
  std::vector<Eigen::bfloat16> negated(rows * m.stride), columns(m.stride * 30);
  std::vector<VnniPair> pairs(m.stride / 2 * m.rows);
  copy_bfloat16_rows(negated.data(), rows, m.stride, m.stored(), -1);
  transpose_bfloat16(columns.data(), 30, m.view(), pairs.data());
  bool right = true;
  for (Index r = 0; r < rows; ++r) {
    for (Index d = 0; d < m.stride; ++d) {
      right &= static_cast<float>(m.padded_rows[r * m.stride + d]) == m(r, d);
      right &= static_cast<float>(negated[r * m.stride + d]) == -m(r, d);
      if (r >= m.rows) continue;
      right &= static_cast<float>(columns[d * 30 + r]) == m(r, d);
      const auto half = static_cast<std::uint16_t>(m.lanes[d / 2 * m.rows + r] >> (d % 2 == 0 ? 0 : 16));
      right &= static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(half)) == m(r, d);
    }
  }
  CHECK(right);
  CHECK(are_finite(m.x.data(), m.rows * m.cols));
  m.x[30] = Eigen::numext::bit_cast<Eigen::bfloat16>(std::uint16_t(0xff80));  // -infinity
  CHECK_FALSE(are_finite(m.x.data(), m.rows * m.cols));
}

TEST_CASE("tiles and strips cover a sequence in order, of full registers but the last") {
  for (const Index heads : {1, 16}) {
    for (const Index dims : {32, 400}) {
      for (const Index length : {0, 1, 47, 48, 49, 96, 97, 500, 2049}) {
        CAPTURE(heads, dims, length);
        const Strips<float> strips(length, heads, dims);
        Index next = 0, tiles = 0;
        for (Index s = 0; s < strips.count(); ++s) {
          const KeyRange all = strips.positions(s);
          CHECK(all.begin == next);
          CHECK(all.end - all.begin <= Strips<float>::kMostLanes);
          CHECK(strips.tiles(s) <= Strips<float>::most_tiles(dims));
          for (Index t = 0; t < strips.tiles(s); ++t, ++tiles) {
            const auto tile = strips.tile(s, t);
            CHECK(tile.begin == next);
            CHECK((tile.vectors <= kTileVectors && tile.begin % kLanes<float> == 0));
            next = strips.positions(tile).end;
          }
          CHECK(all.end == next);
        }
        CHECK(next == length);
        CHECK(tiles == (length + LaneTiling<float>::kWidth - 1) / LaneTiling<float>::kWidth);
      }
    }
  }
}

TEST_CASE("the backward pass takes each strip of each family once, for any number of workers") {
  for (const auto& [families, run] : {std::pair<Index, Index>{0, 1}, {1, 1}, {3, 1}, {8, 1}, {8, 3}, {100, 16}}) {
    for (const Index workers : {1, 2, 3, 5}) {
      constexpr Index kStrips = 4;
      CAPTURE(families, run, workers);
      const BackwardTasks tasks(families, run, kStrips, workers);
      std::vector<Index> taken(families * kStrips);
      for (Index task = 0; task < tasks.count(); ++task) {
        const Index family = tasks.family(task);
        if (tasks.is_whole(task)) {
          CHECK(tasks.end_of_run(task) - family <= run);
          for (Index i = family * kStrips; i < tasks.end_of_run(task) * kStrips; ++i) ++taken[i];
        } else {  // a task waits for those of earlier strips, which have to start before
          const Index strip = tasks.strip(task);
          ++taken[family * kStrips + strip];
          for (Index s = 0; s < strip; ++s) CHECK(taken[family * kStrips + s] == 1);
        }
      }
      CHECK(std::all_of(taken.begin(), taken.end(), [](Index times) { return times == 1; }));
      CHECK((tasks.whole_families % workers == 0 && tasks.split < workers));
    }
  }
}

TEST_CASE("heads that share keys, or the gradient of a bias, are one family") {
  BackwardProblem x;
  x.q.shape = {2, 6, 10, 8}, x.k.shape = {2, 3, 10, 8};
  const auto members = [&] {
    std::vector<HeadIndex> seen;
    const HeadFamilies families(x);
    for (Index f = 0; f < families.count(); ++f) {
      CHECK(families[f].size() == families.members());
      families[f].for_each([&](HeadIndex head) {
        CHECK(families[f].member(head) == static_cast<Index>(seen.size()) % families.members());
        seen.push_back(head);
      });
    }
    std::vector<Index> times(12);
    for (const HeadIndex& head : seen) ++times[head.b * 6 + head.h];
    CHECK(times == std::vector<Index>(12, 1));
    return families.members();
  };
  CHECK(members() == 2);  // two heads of q for each of k
  x.k.shape[0] = 1;
  CHECK(members() == 4);
  static float bias;
  x.param_grads.bias = TensorView<float>{&bias, {2, 6, 10, 10}, {100, 0, 10, 1}};
  CHECK(members() == 12);
}

TEST_CASE("turns let threads through in order", "[threads]") {
  Turn<int> turn;
  std::vector<int> order;
  const auto take = [&](int first) {
    for (int i = first; i < 40; i += 2) turn.wait_for(i), order.push_back(i), turn.end(i);
  };
  std::thread other([&] { take(1); });
  take(0), other.join();
  std::vector<int> expected(40);
  std::iota(expected.begin(), expected.end(), 0);
  CHECK(order == expected);
}

namespace {

/// A problem of one head whose scores are given.
struct ScoresAlone {
  ForwardProblem x;
  AttentionParams params{.scale = 1.0};
  NoMask none;

  ScoresAlone(Index queries, Index keys) { x.q.shape = {1, 1, queries, 4}, x.k.shape = {1, 1, keys, 4}; }
  ScoreFunction<float> function() const { return {params, MaskRef(none), x}; }
};

/// Scores of a tile after a score function, with queries in lanes and in rows: both [keys][queries].
std::array<std::vector<float>, 2> both_ways(const ScoresAlone& problem, Index queries, Index keys) {
  constexpr Index kWidth = LaneTiling<float>::kWidth, kSize = 64;
  const ScoreFunction<float> score = problem.function();
  const auto products = whole_numbers<float>(keys * queries);
  std::vector<float> in_lanes(kSize * kWidth), in_rows(kSize * kWidth), buffer(kSize * kWidth);
  for (Index j = 0; j < keys; ++j) {
    for (Index i = 0; i < queries; ++i) in_lanes[j * kWidth + i] = in_rows[i * kWidth + j] = products[j * queries + i];
  }
  const QueryRun<float, kWidth> lanes(score.mask(), problem.params, {0, 0}, {0, queries}, keys);
  const QueryRun<float, kSize> rows(score.mask(), problem.params, {0, 0}, {0, queries}, keys);
  const ScoreMemory<float> memory(buffer.data());
  score.apply(TileScores<float, kWidth, true>{in_lanes.data(), kWidth, {0, 0}, {0, keys}, lanes}, memory);
  score.apply(TileScores<float, kSize, false>{in_rows.data(), kWidth, {0, 0}, {0, keys}, rows}, memory);
  std::array<std::vector<float>, 2> result;
  for (Index j = 0; j < keys; ++j) {
    for (Index i = 0; i < queries; ++i) {
      result[0].push_back(in_lanes[j * kWidth + i]), result[1].push_back(in_rows[i * kWidth + j]);
    }
  }
  return result;
}

}  // namespace

TEST_CASE("each score term is the same with queries in lanes and in rows") {
  constexpr Index queries = 7, keys = 8;  // both fit in the lanes of the narrowest tile
  const auto products = whole_numbers<float>(keys * queries), bias = whole_numbers<float>(queries * keys, 5);
  const auto check = [&](const AttentionParams& params, auto&& expected) {
    ScoresAlone problem(queries, keys);
    problem.params = params, problem.params.scale = 2.0;
    const auto [lanes, rows] = both_ways(problem, queries, keys);
    CHECK(lanes == rows);
    for (Index j = 0; j < keys; ++j) {
      for (Index i = 0; i < queries; ++i) {
        CHECK(lanes[j * queries + i] == Approx(expected(2 * products[j * queries + i], i, j)));
      }
    }
  };
  AttentionParams params;
  params.bias = TensorView<const float>{bias.data(), {1, 1, queries, keys}, {0, 0, keys, 1}};
  check(params, [&](float s, Index i, Index j) { return s + bias[i * keys + j]; });
  params = {.softcap = 3};
  check(params, [&](float s, Index, Index) { return 3 * std::tanh(s / 3); });
  params = {.query_offset = 2};
  params.relative_bias = TensorView<const float>{bias.data(), {1, 1, 1, 5}, {0, 0, 0, 1}};
  check(params, [&](float s, Index i, Index j) { return s + bias[std::clamp<Index>(i + 2 - j, -2, 2) + 2]; });
  params = {.query_offset = 2};
  params.slopes = TensorView<const float>{bias.data(), {1, 1, queries, 1}, {0, 0, 1, 0}};
  check(params, [&](float s, Index i, Index j) { return s - bias[i] * static_cast<float>(std::abs(i + 2 - j)); });
  bool mask[queries * keys];
  for (Index e = 0; e < queries * keys; ++e) mask[e] = bias[e] > 0;
  params = {};
  params.mask = {mask, {1, 1, queries, keys}, {0, 0, keys, 1}};
  check(params, [&](float s, Index i, Index j) { return bias[i * keys + j] > 0 ? s : kHidden<float>; });
  params = {.block_size = 3};
  params.block_mask = {mask, {1, 1, 3, 3}, {0, 0, 3, 1}};
  check(params, [&](float s, Index i, Index j) { return bias[i / 3 * 3 + j / 3] > 0 ? s : kHidden<float>; });
}

TEST_CASE("a softmax over keys that come in blocks is that over all of them") {
  constexpr Index N = kLanes<float>, kKeys = 40;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<float> scores(kKeys * N);
  for (Index j = 0; j < kKeys; ++j) {  // the maximum rises all the time; lane 0 sees no key, lane 1 every other one
    for (Index l = 0; l < N; ++l) {
      const bool hidden = l == 0 || (l == 1 && j % 2 == 0);
      scores[j * N + l] = hidden ? kHidden<float> : 5 * normal(generator) + static_cast<float>(j);
    }
  }
  for (const bool has_sink : {false, true}) {
    ScoresAlone problem(N, kKeys);
    const float sink = 30;
    if (has_sink) problem.params.sink = TensorView<const float>{&sink, {1, 1, 1, 1}, {}};
    const ScoreFunction<float> score = problem.function();
    std::vector<float> maximum(N), sum(N), weights = scores;
    std::vector<double> mean(N);  // of the numbers of the keys
    const SoftmaxState<float> state{maximum.data(), sum.data()};
    state.begin(N);
    Index first = 0;
    for (const Index count : {1, 17, 2, 20}) {
      float* const block_scores = weights.data() + first * N;
      SoftmaxBlock<float, 1> block(state, score.factor());
      block.raise_anew(block_scores, count), block.fix_maximum(state);
      block.weights(block_scores, 0, count), block.end(state);
      float decay[N];
      simd::store(decay, block.decay[0]);
      for (Index l = 0; l < N; ++l) {
        mean[l] *= static_cast<double>(decay[l]);
        for (Index j = 0; j < count; ++j) mean[l] += static_cast<double>(block_scores[j * N + l]) * (first + j);
      }
      first += count;
    }
    const FinishedSoftmax<float> finished(state, N, score, 0);
    for (Index l = 0; l < N; ++l) {
      CAPTURE(has_sink, l);
      double total = has_sink ? std::exp(30.0) : 0, moment = 0;
      for (Index j = 0; j < kKeys; ++j) {
        if (scores[j * N + l] == kHidden<float>) continue;
        const double weight = std::exp(static_cast<double>(scores[j * N + l]));
        total += weight, moment += weight * static_cast<double>(j);
      }
      if (total == 0) {
        CHECK((finished.inverse[l] == 0 && finished.lse[l] == -std::numeric_limits<double>::infinity()));
        continue;
      }
      CHECK(finished.lse[l] == Approx(std::log(total)).epsilon(1e-6));
      CHECK(mean[l] * static_cast<double>(finished.inverse[l]) == Approx(moment / total).epsilon(1e-5));
    }
  }
}

TEST_CASE("blocks of columns of a matrix are heads, in either layout") {
  const Eigen::MatrixXf columns = Eigen::MatrixXf::Random(5, 12);
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> rows = columns;
  const TensorView<const float> of_columns = matrix_view(columns, 3);
  const TensorView<float> of_rows = matrix_view(rows, 3);
  CHECK(of_columns.shape == std::array<Index, 4>{1, 3, 5, 4});
  CHECK(of_rows.shape == of_columns.shape);
  for (Index h = 0; h < 3; ++h) {
    for (Index l = 0; l < 5; ++l) {
      for (Index d = 0; d < 4; ++d) {
        REQUIRE(of_columns(0, h, l, d) == columns(l, 4 * h + d));
        REQUIRE(&of_rows(0, h, l, d) == &rows(l, 4 * h + d));
      }
    }
  }
}
