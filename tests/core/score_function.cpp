// Score and mask functions of one's own: beside the built-in ones, their derivatives, their tables.

#include "core/attention_run.hpp"

using namespace headroom;
using namespace headroom::core;
using namespace headroom::testing;

namespace {

const Problem kOwnProblem{.batch = 2, .heads = 4, .queries = 150, .keys = 170, .dim = 24, .value_dim = 24};

/// s - slope(head)·|distance|
const auto kAlibi = [](auto score, auto at, auto slopes) { return score - slopes(at.head) * abs(at.distance); };
const auto kSoftcap = [](auto score, auto) { return 2.5 * tanh(score / 2.5); };
/// s + table(head, distance), distances beyond the table take its ends
const auto kRelative = [](auto score, auto at, auto table) { return score + table(at.head, at.distance + 29); };

/// The same with a derivative of its own.
struct SoftcapByHand {
  template <class Scalar, class Place>
  Lanes<Scalar> operator()(Lanes<Scalar> score, const Place&) const {
    return 2.5 * tanh(score / 2.5);
  }
  template <class Scalar, class Place>
  Lanes<Scalar> derivative(Lanes<Scalar> score, const Place&) const {
    const Lanes<Scalar> t = tanh(score / 2.5);
    return 1 - t * t;
  }
};

struct CausalWindow {
  Index reach, offset;

  template <class Scalar>
  LaneMask<Scalar> operator()(const ScorePlace<Scalar>& at) const {
    return at.distance >= 0 && at.distance <= reach;
  }
};
struct CausalWindowOfBlocks : CausalWindow {
  Seen block(Index, Index, KeyRange queries, KeyRange keys) const {
    const Index nearest = queries.begin + offset - (keys.end - 1), furthest = queries.end - 1 + offset - keys.begin;
    if (furthest < 0 || nearest > reach) return Seen::none;
    return nearest >= 0 && furthest <= reach ? Seen::all : Seen::some;
  }
};

/// A run with tables of a score function of one's own.
template <class Scalar>
struct OwnRun : Run<Scalar> {
  std::vector<std::vector<Scalar>> tables;

  using Run<Scalar>::Run;
  template <std::size_t N>
  std::array<ScoreTable, N> table_views(const std::array<Index, N>& columns) {
    std::array<ScoreTable, N> views;
    Index size = 0;
    for (std::size_t t = 0; t < N; ++t) {
      const auto count = static_cast<Index>(tables[t].size());
      views[t] = {tables[t].data(), count / columns[t], columns[t]};
      size += count;
    }
    this->grad_tables.assign(size, 0);
    return views;
  }
};

/// CHECKs that results of two runs in the same type differ by no more than rounding does: twice the RMS error and four
/// times the largest of the second, or a few roundings of numbers of order 1.
template <class Scalar>
void check_equivalent(Run<Scalar>& ours, Run<Scalar>& built_in, Run<double>& exact) {
  const double rounding = 16 * static_cast<double>(std::numeric_limits<Scalar>::epsilon());
  for_each_result(
      [&](const std::string& name, const auto& x, const auto& by_built_in, const auto& by_exact) {
        if (x.empty()) return;  // what only a built-in term has
        CAPTURE(name);
        const Deviation error = deviation(x, by_exact), theirs = deviation(by_built_in, by_exact);
        CHECK(error.rms() <= std::max(2 * theirs.rms(), rounding));
        CHECK(error.maximum <= std::max(4 * theirs.maximum, 4 * rounding));
      },
      ours, built_in, exact);
}

template <class Scalar>
void check_tables(const std::vector<double>& ours, const std::vector<double>& built_in,
                  const std::vector<double>& exact) {
  REQUIRE(ours.size() == exact.size());
  const double rounding = 16 * static_cast<double>(std::numeric_limits<Scalar>::epsilon());
  CHECK(deviation(ours, exact).maximum <= std::max(4 * deviation(built_in, exact).maximum, rounding));
}

}  // namespace

TEMPLATE_TEST_CASE("functions of one's own do what the built-in terms do", "", float, double) {
  using T = TestType;
  const CausalMask mask{20};
  SECTION("slopes") {
    Problem p = kOwnProblem;
    p.slopes = {1, 4, 1, 1};
    Run<T> built_in(p);
    Run<double> exact(p);
    OwnRun<T> own(kOwnProblem);
    own.tables = {built_in.slopes};
    const auto tables = own.table_views(std::array{Index(4)});
    built_in.tiled({.query_offset = 20}, mask), exact.reference({.query_offset = 20}, mask);
    own.tiled({.query_offset = 20, .score_function = ScoreFunctionRef(kAlibi, tables)}, mask);
    check_equivalent<T>(own, built_in, exact);
    check_tables<T>(own.grad_tables, built_in.grad_slopes, exact.grad_slopes);
  }
  SECTION("softcap") {
    Run<T> built_in(kOwnProblem);
    Run<double> exact(kOwnProblem);
    OwnRun<T> own(kOwnProblem), by_hand(kOwnProblem);
    built_in.tiled({.softcap = 2.5}, mask), exact.reference({.softcap = 2.5}, mask);
    own.tiled({.score_function = ScoreFunctionRef(kSoftcap)}, mask);
    check_equivalent<T>(own, built_in, exact);
    const SoftcapByHand function;
    by_hand.tiled({.score_function = ScoreFunctionRef(function)}, mask);
    check_equivalent<T>(by_hand, built_in, exact);
  }
  SECTION("relative bias") {
    Problem p = kOwnProblem;
    p.relative_reach = 30;
    Run<T> built_in(p);
    Run<double> exact(p);
    OwnRun<T> own(kOwnProblem);
    own.tables = {built_in.relative};
    const auto tables = own.table_views(std::array{Index(59)});
    built_in.tiled(), exact.reference();
    own.tiled({.score_function = ScoreFunctionRef(kRelative, tables)});
    check_equivalent<T>(own, built_in, exact);
    check_tables<T>(own.grad_tables, built_in.grad_relative, exact.grad_relative);
  }
  SECTION("causal window") {
    Run<T> built_in(kOwnProblem);
    Run<double> exact(kOwnProblem);
    OwnRun<T> own(kOwnProblem), by_blocks(kOwnProblem);
    const WindowMask window{40, 0, 20};
    built_in.tiled({}, window), exact.reference({}, window);
    const CausalWindow sees{40, 20};
    own.tiled({.query_offset = 20, .mask_function = MaskFunctionRef(sees)});
    check_equivalent<T>(own, built_in, exact);
    const CausalWindowOfBlocks sees_blocks{{40, 20}};
    by_blocks.tiled({.query_offset = 20, .mask_function = MaskFunctionRef(sees_blocks)});
    check_equivalent<T>(by_blocks, built_in, exact);
  }
}

TEST_CASE("gradients of tables are those of central differences, whatever indexes them") {
  // by head and batch, by query, by key, by a pair, by a distance that is folded, and two look-ups of one table
  const auto function = [](auto score, auto at, auto by_head, auto by_query, auto by_key, auto by_pair, auto folded) {
    const auto gate = by_query(at.query) * by_key(at.key);
    return score * (1 + 0.1 * by_head(at.batch, at.head)) + gate * gate + by_pair(at.query, floor(at.key / 2)) +
           exp(0.3 * folded(abs(at.distance) - 3)) * folded(at.key - 2 * floor(at.key / 2));
  };
  const Problem p{.batch = 2, .heads = 2, .queries = 21, .keys = 19, .dim = 5, .value_dim = 3};
  OwnRun<double> run(p);
  std::mt19937 generator(5);
  std::normal_distribution<double> normal;
  const std::array<Index, 5> columns{2, 21, 19, 10, 7};
  const std::array<Index, 5> sizes{4, 21, 19, 210, 7};
  for (const Index size : sizes) {
    run.tables.emplace_back();
    for (Index i = 0; i < size; ++i) run.tables.back().push_back(normal(generator));
  }
  const auto tables = run.table_views(columns);
  const AttentionParams params{.score_function = ScoreFunctionRef(function, tables)};
  run.tiled(params, CausalMask{3});
  const std::vector<double> gradient = run.grad_tables;
  const auto loss = [&] {
    attention_forward(run.forward_tensors(), params, CausalMask{3}, SerialExecutor{});
    double sum = 0;
    for (size_t i = 0; i < run.output.size(); ++i) sum += run.output[i] * run.grad[i];
    return sum;
  };
  size_t at = 0;
  double largest = 0, worst = 0;
  for (std::vector<double>& table : run.tables) {
    for (double& element : table) {
      const double before = element, step = 2e-4;
      const auto change = [&](double by) {
        element = before + by;
        const double above = loss();
        element = before - by;
        return above - loss();
      };
      const double difference = (8 * change(step) - change(2 * step)) / (12 * step);  // exact but for step^4
      element = before;
      worst = std::max(worst, std::abs(difference - gradient[at]));
      largest = std::max(largest, std::abs(gradient[at++]));
    }
  }
  CHECK(largest > 0.1);
  CHECK(worst < 1e-8);
}

TEST_CASE("functions of one's own: the same bits for any number of workers, and nothing of what is hidden",
          "[threads]") {
  const auto function = [](auto score, auto at, auto table) { return score + score * table(at.head, at.distance); };
  const CausalWindow sees{60, 0};
  const auto run = [&](OwnRun<float>& x, const auto& executor) {
    std::mt19937 generator(9);
    x.tables.assign(1, std::vector<float>(4 * 40));
    for (float& e : x.tables[0]) e = static_cast<float>(generator() % 1000) * 1e-3F;
    const auto tables = x.table_views(std::array{Index(40)});
    const AttentionParams params{.score_function = ScoreFunctionRef(function, tables),
                                 .mask_function = MaskFunctionRef(sees)};
    x.tiled(params, NoMask{}, executor);
  };
  Problem p = kOwnProblem;
  p.queries = p.keys = 400, p.kv_heads = 2;
  OwnRun<float> serial(p), parallel(p), spoiled(p);
  run(serial, SerialExecutor{});
#ifdef _OPENMP
  run(parallel, OpenMpExecutor{3});
#else
  run(parallel, SerialExecutor{});
#endif
  check_same(serial, parallel);
  CHECK((serial.grad_tables == parallel.grad_tables));
  // Queries 61 … do not see key 0
  for (Index h = 0; h < p.batch * p.kv_heads; ++h) {
    for (Index d = 0; d < p.dim; ++d) {
      spoiled.k[h * p.keys * p.dim + d] = std::numeric_limits<float>::quiet_NaN();
      spoiled.v[h * p.keys * p.dim + d] = std::numeric_limits<float>::infinity();
    }
  }
  run(spoiled, SerialExecutor{});
  Index equal = 0;
  for (Index h = 0; h < p.batch * p.heads; ++h) {
    for (Index i = 61 * p.dim; i < p.queries * p.dim; ++i) {
      equal += serial.output[h * p.queries * p.dim + i] == spoiled.output[h * p.queries * p.dim + i] &&
               serial.grad_q[h * p.queries * p.dim + i] == spoiled.grad_q[h * p.queries * p.dim + i];
    }
  }
  CHECK(equal == p.batch * p.heads * (p.queries - 61) * p.dim);
}

/// Sees every seventh strip of 32 keys, and counts the pairs that it is asked for.
struct Stripes {
  Index* pairs;

  static bool sees(Index key) { return key / 32 % 7 == 3; }
  template <class Scalar>
  LaneMask<Scalar> operator()(const ScorePlace<Scalar>& at) const {
    *pairs += simd::kLanes<Scalar>;
    const auto strip = floor(Lanes<Scalar>(at.key) / 32);
    return strip - 7 * floor(strip / 7) == 3;
  }
  Seen block(Index, Index, KeyRange, KeyRange keys) const {
    Index seen = 0;
    for (Index key = keys.begin; key < keys.end; ++key) seen += sees(key);
    return seen == 0 ? Seen::none : seen == keys.end - keys.begin ? Seen::all : Seen::some;
  }
};

TEST_CASE("a mask function with block is asked for no more than the pairs along its borders") {
  Problem p = kOwnProblem;
  p.queries = 200, p.keys = 640;
  Run<float> own(p), built_in(p);
  Index pairs = 0;
  const Stripes stripes{&pairs};
  own.tiled({.mask_function = MaskFunctionRef(stripes)});
  // A strip begins and ends where the kernel's strips of 16 do: nothing is left to be asked but tiles of keys in lanes
  CHECK(pairs < p.batch * p.heads * p.queries * p.keys / 2);
  const auto mask = std::make_unique<bool[]>(p.keys);
  for (Index key = 0; key < p.keys; ++key) mask[key] = Stripes::sees(key);
  AttentionParams params;
  params.mask = {mask.get(), {p.batch, p.heads, p.queries, p.keys}, {0, 0, 0, 1}};
  built_in.tiled(params);
  for_each_result(
      [](const std::string& name, const auto& x, const auto& y) {
        CAPTURE(name);
        CHECK(deviation(x, y).maximum < 2e-6);
      },
      own, built_in);
}

TEST_CASE("a function of one's own takes what all other options make of a score") {
  const BothMasks mask{CausalMask{39}, GlobalWindowMask{{60, -1, 39}, 3}};
  const auto half = [](auto score, auto) { return 0.5 * score + 1; };
  AttentionParams own = kEveryOption;
  own.score_function = ScoreFunctionRef(half);
  // Half of everything that is added, of the cap and of the scale, and a bias and a sink that know of the 1
  Run<double> ours(kEverything), halved(kEverything);
  for (auto* x : {&halved.bias, &halved.relative, &halved.slopes}) {
    for (double& e : *x) e *= 0.5;
  }
  for (double& e : halved.bias) e += 1;
  AttentionParams by_hand = kEveryOption;
  by_hand.softcap = 4, by_hand.scale = 0.5 / std::sqrt(24.0);
  ours.tiled(own, mask), halved.reference(by_hand, mask);
  for (auto* x : {&halved.grad_bias, &halved.grad_relative, &halved.grad_slopes}) {
    for (double& e : *x) e *= 0.5;
  }
  for_each_result(
      [](const std::string& name, const auto& x, const auto& y) {
        CAPTURE(name);
        CHECK(deviation(x, y).maximum < 1e-11);
      },
      ours, halved);
}

TEST_CASE("numbers in lanes compute as numbers do, and carry their derivatives") {
  const auto check = [](auto zero, auto f, double x) {
    using Scalar = decltype(zero);
    CAPTURE(x);
    Scalar value[simd::kLanes<Scalar>], plain[simd::kLanes<Scalar>], slope[simd::kLanes<Scalar>];
    const Dual<Scalar> y = f(Dual<Scalar>(Lanes<Scalar>(x), 1));
    simd::store(value, y.value.packet), simd::store(slope, y.slope.packet);
    simd::store(plain, Lanes<Scalar>(f(Lanes<Scalar>(x))).packet);
    const auto exact = [&](double at) {  // in double
      double lanes[simd::kLanes<double>];
      simd::store(lanes, Lanes<double>(f(Lanes<double>(at))).packet);
      return lanes[0];
    };
    const double step = 1e-6 * std::max(1.0, std::abs(x)),
                 difference = (exact(x + step) - exact(x - step)) / (2 * step);
    const double tolerance = std::is_same_v<Scalar, float> ? 3e-6 : 1e-8;
    CHECK(static_cast<double>(value[0]) == Approx(exact(x)).epsilon(tolerance).margin(tolerance));
    CHECK(value[0] == plain[0]);
    CHECK(static_cast<double>(slope[simd::kLanes<Scalar> - 1]) == Approx(difference).epsilon(tolerance).margin(1e-6));
  };
  const auto check_all = [&](auto zero) {
    for (const double x : {-3.7, -0.4, 0.3, 2.6}) {
      check(
          zero, [](auto s) { return s * s - 2 / (s + 10) + 3; }, x);
      check(
          zero, [](auto s) { return -abs(s) * 2; }, x);
      check(
          zero, [](auto s) { return max(s, 0.5) + min(s, 1) + max(-1, s); }, x);
      check(
          zero, [](auto s) { return exp(0.5 * s) + tanh(s) + floor(s); }, x);
      check(
          zero, [](auto s) { return log(s * s) + sqrt(s + 5); }, x);
      check(
          zero, [](auto s) { return where(s < 0 || (s >= 2 && !(s == 4)), 3 * s, s / 2); }, x);
      check(
          zero, [](auto s) { return where(s <= 0 || s > 100 || s != s, 3 * s, 7); }, x);
    }
  };
  check_all(0.0F), check_all(0.0);
}

TEST_CASE("tables of a score function are checked") {
  const auto function = [](auto score, auto at, auto table) { return score + table(at.key); };
  const Problem p{.queries = 3, .keys = 3};
  OwnRun<float> run(p);
  const auto take = [&](const std::array<ScoreTable, 1>& tables) {
    run.tiled({.score_function = ScoreFunctionRef(function, tables)});
  };
  const auto id = [&](const ScoreTable& table) { return error_of([&] { take({table}); }).id(); };
  const std::vector<double> numbers(3);
  const std::vector<float> narrow(3);
  CHECK(id({numbers.data(), 1, 3}) == "headroom.core.attention.score_function");
  CHECK(id({narrow.data(), 1, 0}) == "headroom.core.attention.score_function");
  CHECK(id({}) == "headroom.core.attention.score_function");
  const std::array<ScoreTable, 1> right{ScoreTable{narrow.data(), 1, 3}};
  CHECK_NOTHROW(take(right));
  // Their gradients have as many elements, and the plain loops of the reference know no functions
  run.grad_tables.resize(2);
  CHECK(error_of([&] { take(right); }).id() == "headroom.core.attention.shape");
  CHECK(error_of([&] { run.reference({.score_function = ScoreFunctionRef(function, right)}); }).id() ==
        "headroom.core.attention.score_function");
  // Tiles of the kernels have to be whole vectors where the function was compiled
  auto calls = ScoreFunctionRef::calls<decltype(function), 1>();
  calls.lanes = 64;
  CHECK(error_of([&] { run.tiled({.score_function = ScoreFunctionRef(&function, calls, right.data())}); }).id() ==
        "headroom.core.attention.lanes");
}
