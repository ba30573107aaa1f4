// What AttentionParams adds to plain attention, each alone and together, in values and gradients.

#include <string_view>

#include "core/attention_run.hpp"

using namespace headroom;
using namespace headroom::core;
using namespace headroom::testing;

namespace {

const Problem kProblem{.batch = 2, .heads = 4, .queries = 150, .keys = 170};

Problem with(void (*change)(Problem&), Problem p = kProblem) {
  change(p);
  return p;
}

}  // namespace

TEST_CASE("a bias of any broadcast shape, and its gradient") {
  for (const Extents& shape : {Extents{2, 4, 150, 170}, Extents{1, 4, 150, 170}, Extents{2, 1, 150, 170},
                               Extents{1, 1, 150, 170}, Extents{2, 4, 1, 170}, Extents{1, 1, 1, 170},
                               Extents{2, 4, 150, 1}, Extents{1, 4, 150, 1}, Extents{2, 4, 1, 1}}) {
    CAPTURE(shape);
    Problem p = kProblem;
    p.bias = shape;
    p.sink = shape[3] == 1;  // without a sink, what is added to all scores of a query has no effect
    check_accuracy(p);
  }
}

TEST_CASE("relative position bias: by head or shared, longer and shorter than the sequence") {
  for (const Index reach : {1, 20, 150, 400}) {
    const Index heads = reach <= 20 ? 32 : 2;  // enough sums that an RMS error is more than a few roundings
    check_accuracy({.batch = 2, .heads = heads, .queries = 150, .keys = 170, .relative_reach = reach});
    if (reach == 1) continue;  // one number for all scores has no effect: its gradient is nothing but rounding
    check_accuracy({.batch = 2, .queries = 150, .keys = 170, .relative_reach = reach, .relative_shared = true},
                   {.query_offset = 20});
  }
}

TEST_CASE("slopes by head and by query") {
  check_accuracy(with([](Problem& p) { p.heads = 16, p.slopes = {1, 16, 1, 1}; }));
  check_accuracy(with([](Problem& p) { p.slopes = {2, 4, 150, 1}; }), {.query_offset = 20});
  check_accuracy(with([](Problem& p) { p.slopes = {2, 1, 150, 1}; }), {}, CausalMask{});
}

TEST_CASE("softcap, strong and weak") {
  for (const double cap : {0.5, 5.0, 50.0}) {
    check_accuracy(with([](Problem& p) { p.amplitude = 4; }), {.softcap = cap});
    check_accuracy(with([](Problem& p) { p.amplitude = 4; }), {.scale = -0.2, .softcap = cap});
  }
}

TEST_CASE("a sink takes its share, also where a query sees no key") {
  check_accuracy(with([](Problem& p) { p.sink = true, p.heads = 32; }));
  check_accuracy(with([](Problem& p) { p.sink = true, p.heads = 32; }), {}, CausalMask{-30});
}

TEST_CASE("a boolean mask of any broadcast shape, either way round") {
  for (const Extents& shape : {Extents{2, 4, 150, 170}, Extents{1, 1, 150, 170}, Extents{2, 1, 1, 170},
                               Extents{2, 4, 150, 1}, Extents{1, 1, 1, 1}}) {
    Problem p = kProblem;
    p.mask = shape;
    check_accuracy(p);
    check_accuracy(p, {.mask_visible = false}, CausalMask{10});
  }
}

TEST_CASE("a block mask skips blocks of any size") {
  for (const Index size : {1, 16, 50, 128, 1000}) {
    check_accuracy({.batch = 2, .queries = 150, .keys = 170, .blocks = size});
  }
}

TEST_CASE("windows, with and without an offset") {
  for (const Index left : {-1, 0, 20}) {
    for (const Index right : {-1, 0, 7}) {
      check_accuracy(kProblem, {}, WindowMask{left, right});
      check_accuracy(kProblem, {}, WindowMask{left, right, 20});
    }
  }
}

TEST_CASE("a window and global tokens: two ranges a query") {
  for (const Index tokens : {0, 1, 16, 70, 1000}) {
    check_accuracy(kProblem, {}, GlobalWindowMask{{9, 9}, tokens});
    check_accuracy(kProblem, {}, BothMasks{CausalMask{20}, GlobalWindowMask{{9, -1, 20}, tokens}});
  }
  check_accuracy({.batch = 2, .heads = 4, .queries = 500, .keys = 500, .dim = 64, .value_dim = 64, .kv_heads = 2}, {},
                 GlobalWindowMask{{30, 30}, 5});
  check_accuracy(with([](Problem& p) {
                   p.bias = {1, 4, 150, 170}, p.mask = {2, 1, 150, 170}, p.relative_reach = 30, p.sink = true;
                 }),
                 {.softcap = 4, .dropout = {0.2, 5}}, GlobalWindowMask{{9, 9}, 4});
  check_accuracy(with([](Problem& p) { p.amplitude = 1e6; }), {}, GlobalWindowMask{{9, 9}, 4});
}

TEST_CASE("packed sequences: every query sees its own") {
  // sequences of 40, 0, 100 and 10 queries and 50, 20, 0 and 100 keys
  std::vector<Index> begin, end, position;
  for (Index i = 0; i < 150; ++i) {
    const Index sequence = i < 40 ? 0 : i < 140 ? 2 : 3;
    begin.push_back(sequence == 0 ? 0 : 70);
    end.push_back(sequence == 0 ? 50 : sequence == 2 ? 70 : 170);
    position.push_back(sequence == 0 ? i : sequence == 2 ? 70 + i - 40 : 70 + i - 140);
  }
  const RangeMask mask{begin.data(), end.data()};
  const AttentionParams params{.query_positions = position.data()};
  check_accuracy(kProblem, params, mask);
  check_accuracy(with([](Problem& p) {
                   p.relative_reach = 30, p.slopes = {1, 4, 1, 1}, p.rotary = true;
                 }),
                 params, mask);
}

TEST_CASE("rotary embedding inside the kernel") {
  check_accuracy(with([](Problem& p) { p.rotary = true; }));
  check_accuracy(with([](Problem& p) { p.rotary = true, p.dim = 9, p.kv_heads = 2; }), {.query_offset = 20},
                 CausalMask{20});
}

TEST_CASE("polar position embedding inside the kernel, and the gradient of its phases") {
  check_accuracy(with([](Problem& p) { p.polar = true; }));
  for (const Index dim : {5, 16, 40, 64}) {
    for (const bool one_batch : {false, true}) {
      Problem p = kProblem;
      p.polar = p.polar_phase = true, p.dim = dim, p.kv_heads = 2, p.one_kv_batch = one_batch;
      check_accuracy(p, {.query_offset = 20}, CausalMask{20});
    }
  }
  // long rows, large features, and magnitudes next to 0
  check_accuracy({.queries = 500, .keys = 500, .dim = 64, .value_dim = 64, .polar = true, .polar_phase = true});
  for (const double amplitude : {0.01, 4.0, 8.0}) {
    Problem p = kProblem;
    p.polar = p.polar_phase = true, p.amplitude = amplitude;
    check_accuracy(p);
  }
}

TEST_CASE("polar position embedding with everything beside it: the bits do not depend on threads", "[threads]") {
  Problem p = kEverything;
  p.rotary = false, p.polar = p.polar_phase = true;
  check_accuracy(p, kEveryOption, BothMasks{CausalMask{39}, GlobalWindowMask{{60, -1, 39}, 4}});
#ifdef _OPENMP
  for (const Index heads : {4, 32}) {  // strips as tasks of their own, and whole families
    p.heads = heads, p.bias = {1, heads, 131, 170}, p.slopes = {2, heads, 131, 1};
    Run<float> serial(p);
    serial.tiled(kEveryOption);
    for (const int threads : {2, 3, 8}) {
      Run<float> parallel(p);
      parallel.tiled(kEveryOption, NoMask{}, OpenMpExecutor{threads});
      check_same(parallel, serial);
    }
  }
#endif
}

TEST_CASE("nothing that is not finite reaches who does not see it through polar positions") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    Problem p = kProblem;
    p.polar = p.polar_phase = true;
    Run<float> clean(p), spoiled(p);
    const auto from = [&](Index row) { return spoiled.k.begin() + row * p.dim; };
    for (Index head = 0; head < p.batch * p.heads; ++head) std::fill_n(from(head * p.keys + 160), p.dim, bad);
    clean.tiled({}, CausalMask{0}), spoiled.tiled({}, CausalMask{0});  // 150 queries: key 160 is unseen
    check_same(spoiled, clean);
  }
}

TEST_CASE("grouped queries and shared batches of keys") {
  for (const Index kv_heads : {1, 2, 4}) {
    for (const bool one_batch : {false, true}) {
      Problem p = kProblem;
      p.kv_heads = kv_heads, p.one_kv_batch = one_batch;
      check_accuracy(p);
      p.bias = {1, 1, 150, 170};
      check_accuracy(p, {}, CausalMask{});
    }
  }
}

TEST_CASE("dropout: the same weights are dropped in both passes") {
  check_accuracy(kProblem, {.dropout = {0.3, 1234567890123456789ULL}});
  check_accuracy(with([](Problem& p) { p.sink = true; }), {.dropout = {0.9, 5}, .first_head = 7}, CausalMask{});
}

TEST_CASE("the log-sum-exp has a gradient") {
  check_accuracy(with([](Problem& p) { p.grad_lse = true; }));
  check_accuracy(with([](Problem& p) { p.grad_lse = true, p.sink = true; }), {.softcap = 3}, CausalMask{-20});
}

TEST_CASE("everything at once") {
  check_accuracy(kEverything, kEveryOption, BothMasks{CausalMask{39}, WindowMask{100, -1, 39}});
}

TEST_CASE("NaN that a query may not see does not reach it, wherever the border runs") {
  const auto spoil = [](Run<float>& run) {
    for (const Index j : {0, 60, 100, 169}) {
      for (Index h = 0; h < run.p.kv_heads; ++h) {
        for (Index d = 0; d < 16; ++d) {
          run.k[(h * 170 + j) * 16 + d] = std::numeric_limits<float>::quiet_NaN();
          run.v[(h * 170 + j) * 16 + d] = d % 2 == 0 ? std::numeric_limits<float>::infinity() : -1e38F * 1e30F;
        }
      }
    }
  };
  // keys 60, 100, 169 and 0 are hidden from queries below 60, 100, … by the triangle, key 0 by the window
  const BothMasks mask{CausalMask{}, WindowMask{50, -1}};
  Problem p = kProblem;
  p.batch = 1;
  Run<float> clean(p), spoiled(p);
  spoil(spoiled);
  clean.tiled({}, mask), spoiled.tiled({}, mask);
  Index equal = 0;
  for (Index h = 0; h < 4; ++h) {
    for (Index i = 0; i < 150; ++i) {
      const bool sees = i <= 50 || (60 <= i && i <= 110) || (100 <= i && i <= 150);
      if (sees) continue;
      for (Index d = 0; d < 16; ++d) {
        const Index at = (h * 150 + i) * 16 + d;
        equal += clean.output[at] == spoiled.output[at] && clean.grad_q[at] == spoiled.grad_q[at];
      }
    }
  }
  CHECK(equal == 4 * 9 * 16);  // queries 51 … 59
}

TEST_CASE("bfloat16 and half are read where they lie and summed in float") {
  const auto check = [](auto type, double epsilon) {
    using T = decltype(type);
    Run<float> run(kProblem);
    const auto narrow = [](std::vector<float>& x) {
      std::vector<T> y;
      for (float& e : x) y.push_back(static_cast<T>(e)), e = static_cast<float>(y.back());
      return y;
    };
    auto q = narrow(run.q), k = narrow(run.k), v = narrow(run.v), grad = narrow(run.grad);
    run.tiled({}, CausalMask{});
    std::vector<T> output(run.output.size()), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
    std::vector<double> lse(run.lse.size());
    const auto of = [&](std::vector<T>& x, Index length) { return dense_view(x.data(), 2, 4, length, 16); };
    const auto lse_view = dense_view(lse.data(), 2, 4, 150, 1);
    attention_forward<T>(
        {.q = of(q, 150), .k = of(k, 170), .v = of(v, 170), .output = of(output, 150), .lse = lse_view}, {},
        CausalMask{});
    // Where such products are used weights are rounded, and sums differ
    const std::string_view kernels = instruction_set();
    if (std::is_same_v<T, Eigen::bfloat16> && (kernels == "avx512bf16" || kernels == "amx")) {
      CHECK(deviation(lse, run.lse).maximum < 1e-5);
      CHECK(deviation(output, run.output).maximum < 2 * epsilon);
    } else {
      CHECK((lse == run.lse));
      std::vector<T> rounded;
      for (const float e : run.output) rounded.push_back(static_cast<T>(e));
      CHECK((output == rounded));
    }
    attention_backward<T>({.q = of(q, 150),
                           .k = of(k, 170),
                           .v = of(v, 170),
                           .output = of(output, 150),
                           .lse = lse_view,
                           .grad_output = of(grad, 150),
                           .grad_q = of(grad_q, 150),
                           .grad_k = of(grad_k, 170),
                           .grad_v = of(grad_v, 170)},
                          {}, CausalMask{});
    CHECK(deviation(grad_q, run.grad_q).maximum < 8 * epsilon);
    CHECK(deviation(grad_k, run.grad_k).maximum < 8 * epsilon);
    CHECK(deviation(grad_v, run.grad_v).maximum < 8 * epsilon);
  };
  check(Eigen::bfloat16(), 0x1p-8);
  check(Eigen::half(), 0x1p-11);
}

namespace {

/// A problem in bfloat16 beside the same numbers in float: rounding weights moves no result by more than a few units of
/// bfloat16 of the terms it sums.
template <class M = NoMask>
void check_bfloat16(
    const Problem& p, const AttentionParams& options = {}, const M& mask = {},
    void (*spoil)(Run<float>&) = [](Run<float>&) {}) {
  CAPTURE(p.batch, p.heads, p.queries, p.keys, p.dim, p.value_dim);
  using T = Eigen::bfloat16;
  Run<float> run(p);
  spoil(run);
  const auto narrow = [](std::vector<float>& x) {
    std::vector<T> y;
    for (float& e : x) y.push_back(static_cast<T>(e)), e = static_cast<float>(y.back());
    return y;
  };
  auto q = narrow(run.q), k = narrow(run.k), v = narrow(run.v), grad = narrow(run.grad);
  run.tiled(options, mask);
  std::vector<T> output(run.output.size()), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  std::vector<double> lse(run.lse.size());
  const AttentionParams params = run.with_tensors(options);
  attention_forward<T>({.q = run.of(q, p.queries, p.dim),
                        .k = run.of_kv(k, p.dim),
                        .v = run.of_kv(v, p.value_dim),
                        .output = run.of(output, p.queries, p.value_dim),
                        .lse = run.of(lse, p.queries, 1)},
                       params, mask);
  attention_backward<T>({.q = run.of(q, p.queries, p.dim),
                         .k = run.of_kv(k, p.dim),
                         .v = run.of_kv(v, p.value_dim),
                         .output = run.of(output, p.queries, p.value_dim),
                         .lse = run.of(lse, p.queries, 1),
                         .grad_output = run.of(grad, p.queries, p.value_dim),
                         .grad_q = run.of(grad_q, p.queries, p.dim),
                         .grad_k = run.of_kv(grad_k, p.dim),
                         .grad_v = run.of_kv(grad_v, p.value_dim)},
                        params, mask);
  const auto compare = [](const char* name, const auto& x, const auto& exact, double tolerance) {
    CAPTURE(name);
    std::vector<double> ours, theirs, zeros;
    size_t agree = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const auto e = static_cast<double>(x[i]), other = static_cast<double>(exact[i]);
      agree += detail::is_finite(e) == detail::is_finite(other);
      if (detail::is_finite(e) && detail::is_finite(other)) ours.push_back(e), theirs.push_back(other);
    }
    CHECK(agree == x.size());
    zeros.resize(theirs.size());
    CHECK(deviation(ours, theirs).rms() <= tolerance * deviation(theirs, zeros).rms());
  };
  compare("output", output, run.output, 0x1p-7), compare("grad_q", grad_q, run.grad_q, 0x1p-7);
  compare("grad_k", grad_k, run.grad_k, 0x1p-7), compare("grad_v", grad_v, run.grad_v, 0x1p-7);
  compare("lse", lse, run.lse, p.polar ? 0x1p-9 : 1e-5);  // polar forms are rounded to bfloat16
}

}  // namespace

TEST_CASE("bfloat16 of any length and head dim") {
  for (const Index dim : {1, 7, 16, 31, 32, 40, 64, 130, 256}) {
    check_bfloat16({.queries = 60, .keys = 70, .dim = dim, .value_dim = dim});
  }
  check_bfloat16({.queries = 60, .keys = 70, .dim = 24, .value_dim = 72});
  check_bfloat16({.queries = 60, .keys = 70, .dim = 72, .value_dim = 24});
  // Many tiles in a group, of head dims whose sum grows a lot when they are padded
  check_bfloat16({.heads = 16, .queries = 300, .keys = 300, .dim = 100, .value_dim = 130});
  check_accuracy({.heads = 16, .queries = 300, .keys = 300, .dim = 100, .value_dim = 130});
  for (const Index length : {16, 17, 31, 32, 33, 48, 49, 127, 128, 129, 160, 300}) {
    check_bfloat16({.queries = length, .keys = length, .dim = 20, .value_dim = 20});
    check_bfloat16({.queries = 50, .keys = length, .dim = 20, .value_dim = 20});
  }
}

TEST_CASE("bfloat16 with every option") {
  const Problem p{.batch = 2, .heads = 4, .queries = 150, .keys = 170, .dim = 24, .value_dim = 40};
  const auto with = [&](auto change) {
    Problem changed = p;
    change(changed);
    return changed;
  };
  check_bfloat16(p, {}, CausalMask{});
  check_bfloat16(p, {}, CausalMask{-40});  // the first 40 queries see nothing
  check_bfloat16(p, {}, WindowMask{20, 5});
  check_bfloat16(p, {.scale = -0.3, .softcap = 4});
  check_bfloat16(p, {.dropout = {0.3, 5}}, CausalMask{});
  check_bfloat16(with([](Problem& x) { x.mask = {2, 1, 150, 170}; }));
  check_bfloat16(with([](Problem& x) { x.bias = {1, 4, 150, 170}, x.kv_heads = 2; }));
  check_bfloat16(with([](Problem& x) { x.relative_reach = 60, x.sink = true, x.one_kv_batch = true; }));
  check_bfloat16(with([](Problem& x) { x.rotary = true, x.slopes = {1, 4, 1, 1}; }));
  for (const Index dim : {5, 24, 64}) {
    Problem x = p;
    x.polar = x.polar_phase = true, x.dim = x.value_dim = dim, x.kv_heads = 2;
    check_bfloat16(x, {}, CausalMask{}), check_bfloat16(x, {.scale = -0.3});
  }
  check_bfloat16(with([](Problem& x) { x.blocks = 30; }), {}, WindowMask{100, -1});
}

TEST_CASE("bfloat16: NaN that no query may see reaches none, one that some may see reaches those") {
  const auto spoil = [](Run<float>& run) {
    for (const Index j : {60, 169}) {
      for (Index h = 0; h < run.p.heads; ++h) {
        for (Index d = 0; d < 16; ++d) {
          run.v[(h * 170 + j) * 16 + d] = std::numeric_limits<float>::quiet_NaN();
          run.k[(h * 170 + j) * 16 + d] = std::numeric_limits<float>::infinity();
        }
      }
    }
  };
  // queries below 60 do not see key 60, nobody sees key 169
  check_bfloat16({.heads = 4, .queries = 150, .keys = 170}, {}, CausalMask{}, spoil);
}

TEST_CASE("the gradient of a bias that is stored in 16 bits is the sum in float, rounded once") {
  const auto check = [](auto type, const Extents& extents, Index kv_heads) {
    using T = decltype(type);
    Problem p{.batch = 3, .heads = 4, .queries = 130, .keys = 520, .kv_heads = kv_heads};
    p.bias = extents;
    CAPTURE(extents[0], extents[1], extents[2], extents[3], kv_heads);
    Run<float> run(p);
    run.tiled({}, CausalMask{300});
    std::vector<T> rounded, narrow(run.bias.size(), T(0));
    for (const float e : run.grad_bias) rounded.push_back(static_cast<T>(e));
    AttentionBackwardTensors<float> x = run.backward_tensors();
    x.param_grads.bias = run.broadcast(narrow.data(), extents, {3, 4, 130, 520});
    attention_backward(x, run.with_tensors({}), CausalMask{300});
    CHECK((narrow == rounded));
  };
  for (const Extents extents :
       {Extents{3, 4, 130, 520}, Extents{1, 4, 130, 520}, Extents{3, 1, 130, 520}, Extents{1, 1, 130, 520},
        Extents{1, 4, 1, 520}, Extents{3, 4, 130, 1}, Extents{1, 1, 1, 520}}) {
    check(Eigen::bfloat16(), extents, 4);
    check(Eigen::half(), extents, 2);
  }
}

#ifdef _OPENMP
TEST_CASE("gradients of what is added to scores are bit-equal for any number of workers", "[threads]") {
  Problem p = kProblem;
  p.bias = {1, 4, 150, 170}, p.relative_reach = 60, p.slopes = {1, 4, 1, 1}, p.sink = true, p.kv_heads = 2;
  p.queries = 150;
  Run<float> serial(p);
  serial.tiled({.dropout = {0.2, 3}});
  for (const int threads : {2, 3, 4}) {
    Run<float> parallel(p);
    parallel.tiled({.dropout = {0.2, 3}}, {}, OpenMpExecutor{threads});
    CHECK((serial.output == parallel.output));
    CHECK((serial.grad_q == parallel.grad_q));
    CHECK((serial.grad_k == parallel.grad_k));
    CHECK((serial.grad_bias == parallel.grad_bias));
    CHECK((serial.grad_relative == parallel.grad_relative));
    CHECK((serial.grad_slopes == parallel.grad_slopes));
    CHECK((serial.grad_sink == parallel.grad_sink));
  }
}
#endif

TEST_CASE("memory that is shared is not written to") {
  Run<float> run({.heads = 2});
  AttentionTensors<float> x = run.forward_tensors();
  x.output.strides[1] = 0;
  const Error error = error_of([&] { attention_forward(x); });
  CHECK(error.id() == "headroom.core.attention.output");
  CHECK(contains(error.what(), "the output [1,2,64,16] is expanded"));
  CHECK(error_of([&] { run.tiled({.dropout = {1.0, 0}}); }).id() == "headroom.core.attention.dropout");
}

namespace {

/// Whatever all scores are moved by, weights stay what they are: uniform, because q is 0.
template <class Scalar>
void check_moved_scores(Scalar by, bool sink) {
  CAPTURE(by, sink);
  Problem p{.batch = 1, .heads = 2, .queries = 140, .keys = 170, .amplitude = 0, .bias = {1, 1, 140, 170}};
  p.sink = sink;
  Run<Scalar> tiled(p), reference(p);
  for (Run<Scalar>* run : {&tiled, &reference}) {
    std::fill(run->bias.begin(), run->bias.end(), by), std::fill(run->sink.begin(), run->sink.end(), by);
  }
  tiled.tiled({}, CausalMask{-3}), reference.reference({}, CausalMask{-3});
  for_each_result(
      [](const std::string& name, const auto& x, const auto& exact) {
        CAPTURE(name);
        if (name != "lse") CHECK(deviation(x, exact).maximum < (sizeof(Scalar) == 8 ? 1e-12 : 1e-4));
      },
      tiled, reference);
  for (Index i = 3; i < 140; ++i) {
    const double keys = static_cast<double>(i - 2 + sink), lse = static_cast<double>(by) + std::log(keys);
    CHECK(std::abs(tiled.lse[i] - lse) <= 1e-7 * std::abs(lse));
  }
}

}  // namespace

TEST_CASE("scores of any size, up to the largest number: weights and gradients are those of their differences") {
  for (const double by : {-1e4, -2e4, -1e8, -1e9, -1e10, -1e15, -1e30, 1e5, 1e9, 1e30}) {
    check_moved_scores<float>(static_cast<float>(by), false), check_moved_scores<double>(by, false);
    check_moved_scores<float>(static_cast<float>(by), true), check_moved_scores<double>(by, true);
  }
  check_moved_scores(std::numeric_limits<float>::lowest(), false);
  check_moved_scores(std::numeric_limits<float>::max(), false);
  check_moved_scores(std::numeric_limits<double>::lowest(), false);
  check_moved_scores(std::numeric_limits<double>::max(), false);
  for (const double amplitude : {1e6, 1e9, 1e18, 1e30}) {
    CAPTURE(amplitude);
    Run<float> one_key({.queries = 9, .keys = 1, .amplitude = amplitude}), many({.keys = 70, .amplitude = amplitude});
    one_key.tiled();
    for (Index d = 0; d < 16; ++d) {
      float sum = 0;
      for (Index i = 0; i < 9; ++i) sum += one_key.grad[i * 16 + d];
      CHECK(one_key.grad_v[d] == Approx(sum).margin(1e-5));
    }
    for (const float x : one_key.grad_q) CHECK(x == 0);
    Run<double> exact({.keys = 70, .amplitude = amplitude});
    many.tiled(), exact.reference();
    CHECK(deviation(many.output, exact.output).maximum < 0.01);
    CHECK(deviation(many.grad_v, exact.grad_v).maximum < 0.01);
  }
}

TEST_CASE("bfloat16 with scores of any size") {
  for (const double by : {-1e9, -1e30, 1e9}) {
    static float value;
    value = static_cast<float>(by);
    check_bfloat16({.queries = 150, .keys = 170, .amplitude = 0, .bias = {1, 1, 150, 170}}, {}, CausalMask{},
                   [](Run<float>& run) { std::fill(run.bias.begin(), run.bias.end(), value); });
  }
}

namespace {

/// Query `spoiled` and its gradient are NaN and infinite: keys it does not see, and all other queries, keep their bits.
template <class Scalar, class M>
void check_spoiled_query(const M& mask, Index spoiled, bool of_query, Problem p = {.queries = 60, .keys = 60}) {
  CAPTURE(spoiled, of_query, sizeof(Scalar));
  p.sink = mask.keys(0, 0, spoiled).empty();
  Run<Scalar> clean(p), run(p);
  for (Index h = 0; h < 2; ++h) {
    for (Index d = 0; d < 16; ++d) {
      (of_query ? run.q : run.grad)[(h * 60 + spoiled) * 16 + d] =
          d % 2 == 0 ? std::numeric_limits<Scalar>::quiet_NaN() : std::numeric_limits<Scalar>::infinity();
    }
  }
  const AttentionParams params{.softcap = 5};
  clean.tiled(params, mask), run.tiled(params, mask);
  Index changed = 0, finite = 0;
  for (Index h = 0; h < 2; ++h) {
    for (Index l = 0; l < 60; ++l) {
      const bool seen = mask.keys(0, 0, spoiled).contains(l);
      for (Index d = 0; d < 16; ++d) {
        const Index at = (h * 60 + l) * 16 + d;
        if (l != spoiled) changed += run.output[at] != clean.output[at] || run.grad_q[at] != clean.grad_q[at];
        if (!seen) changed += run.grad_k[at] != clean.grad_k[at] || run.grad_v[at] != clean.grad_v[at];
        if (seen) finite += core::detail::is_finite(run.grad_k[at]) || core::detail::is_finite(run.grad_v[at]);
      }
    }
  }
  CHECK(changed == 0);
  CHECK(finite == 0);
  CHECK((run.grad_sink == clean.grad_sink));
}

}  // namespace

TEST_CASE("NaN in a query or in its gradient reaches all keys it sees, and no other") {
  std::vector<Index> begin, end;
  for (Index i = 0; i < 60; ++i) begin.push_back(i / 20 * 20), end.push_back(begin.back() + 20);
  for (const bool of_query : {true, false}) {
    for (const Index spoiled : {0, 30, 47}) {
      check_spoiled_query<float>(CausalMask{}, spoiled, of_query);
      check_spoiled_query<float>(WindowMask{9, 5}, spoiled, of_query);
      check_spoiled_query<float>(RangeMask{begin.data(), end.data()}, spoiled, of_query);
      check_spoiled_query<float>(CausalMask{-40}, spoiled, of_query);
    }
    check_spoiled_query<double>(CausalMask{}, 30, of_query);
    check_spoiled_query<double>(CausalMask{-40}, 30, of_query);
  }
}

TEST_CASE("NaN in a key reaches the queries that see it, with a softcap too, and no other") {
  const auto check = [](auto zero) {
    using Scalar = decltype(zero);
    Run<Scalar> clean({.queries = 60, .keys = 60}), run({.queries = 60, .keys = 60});
    for (Index d = 0; d < 16; ++d) run.k[40 * 16 + d] = std::numeric_limits<Scalar>::quiet_NaN();
    clean.tiled({.softcap = 5}, CausalMask{}), run.tiled({.softcap = 5}, CausalMask{});
    Index wrong = 0;
    for (Index i = 0; i < 60 * 16; ++i) {
      const bool hidden = i < 40 * 16;
      wrong += (hidden ? run.output[i] != clean.output[i] : core::detail::is_finite(run.output[i]));
      wrong += (hidden ? run.grad_q[i] != clean.grad_q[i] : core::detail::is_finite(run.grad_q[i]));
    }
    CHECK(wrong == 0);
  };
  check(0.0F), check(0.0);
}

TEST_CASE("packed sequences of which no query in a block sees any key of a tile in between") {
  std::vector<Index> begin, end;
  for (Index i = 0; i < 400; ++i) {  // 30 queries with 390 keys, 370 with 10; then keys that nobody has
    begin.push_back(i < 30 ? 0 : 390), end.push_back(i < 30 ? std::min<Index>(i + 1, 390) : 400);
  }
  check_accuracy({.queries = 400, .keys = 450}, {}, RangeMask{begin.data(), end.data()});
}

TEST_CASE("distances are differences of whole numbers, wherever the queries stand") {
  const Problem p{.queries = 8, .keys = 1000, .amplitude = 0, .slopes = {1, 2, 1, 1}};
  Run<float> run(p);
  run.slopes = {1, 1};
  const Index offset = (Index(1) << 24) + 11;
  run.tiled({.query_offset = offset});
  for (Index i = 0; i < 8; ++i) {  // the next key dominates a geometric series
    CHECK(std::abs(run.lse[i] + static_cast<double>(offset + i - 999) + std::log1p(-std::exp(-1.0))) < 1e-3);
  }
}

TEST_CASE("a block size near the largest number is one block") {
  Run<float> plain({}), run({});
  static const bool seen = true;
  plain.tiled();
  AttentionParams params{.block_size = std::numeric_limits<Index>::max()};
  params.block_mask = {&seen, {1, 2, 1, 1}, {0, 0, 0, 0}};
  run.tiled(params);
  CHECK(deviation(run.output, plain.output).maximum < 1e-6);
}

TEST_CASE("powers of two with a rest, over the whole range") {
  const auto check = [](auto zero, double lowest, double error) {
    using Scalar = decltype(zero);
    constexpr int N = simd::kLanes<Scalar>;
    double worst = 0;
    for (double x = lowest - 30; x < 127; x += 0.00917) {
      for (const double rest : {0.0, 0x1p-11, -0x1p-11, 1e-5}) {
        Scalar power[N];
        simd::store(power, simd::exp2<Scalar>(simd::broadcast(static_cast<Scalar>(x)),
                                              simd::broadcast(static_cast<Scalar>(rest))));
        const long double exact =
            std::exp2(static_cast<long double>(static_cast<Scalar>(x)) - static_cast<Scalar>(rest));
        const auto difference = std::abs(static_cast<long double>(power[0]) - exact);
        if (x < lowest + 1) CHECK(difference < std::exp2(static_cast<long double>(lowest) + 1));
        if (x >= lowest + 1) worst = std::max(worst, static_cast<double>(difference / exact));
      }
    }
    CHECK(worst < error);
  };
  check(0.0F, -126, 1.2e-7), check(0.0, -1020, 4e-16);
}
