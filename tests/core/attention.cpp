#include <bit>
#include <cstdint>

#include "core/attention_run.hpp"

using namespace headroom;
using namespace headroom::core;
using namespace headroom::testing;

TEST_CASE("tiled attention is as accurate as plain loops, for every length and head dim") {
  for (const Index length : {1, 2, 7, 16, 33, 96, 97, 131, 300}) {
    for (const Index dim : {1, 3, 8, 16, 24, 32, 64, 129}) {
      // enough heads that an RMS error is more than a few roundings
      check_accuracy(
          {.heads = length * dim < 512 ? 16 : 2, .queries = length, .keys = length, .dim = dim, .value_dim = dim});
    }
  }
  check_accuracy({.batch = 2, .heads = 3, .queries = 100, .keys = 77, .dim = 16, .value_dim = 40});
  check_accuracy({.queries = 1, .keys = 500, .dim = 256, .value_dim = 5});
  check_accuracy({.queries = 500, .keys = 1, .dim = 5, .value_dim = 256});
}

TEST_CASE("values or keys without features, which have no memory") {
  Run<float> some({.queries = 40, .keys = 40, .dim = 8, .value_dim = 4});
  Run<float> no_values({.queries = 40, .keys = 40, .dim = 8, .value_dim = 0});
  some.tiled({}, CausalMask{}), no_values.tiled({}, CausalMask{});
  CHECK((no_values.lse == some.lse));
  CHECK((no_values.grad_q == std::vector<float>(no_values.q.size())));
  Run<float> no_keys({.queries = 40, .keys = 40, .dim = 0, .value_dim = 8});  // all weights of a query are equal
  no_keys.tiled({}, CausalMask{});
  for (Index i = 0; i < 40; ++i) CHECK(std::abs(no_keys.lse[i] - std::log(static_cast<double>(i + 1))) < 1e-6);
}

TEST_CASE("sharp weights keep their accuracy") {
  check_accuracy({.queries = 300, .keys = 300, .amplitude = 8});
  check_accuracy({.queries = 131, .keys = 300, .dim = 64, .value_dim = 64, .amplitude = 30});
}

TEST_CASE("the scale may be anything finite") {
  for (const double scale : {0.0, 1.0, -0.3, 4.0}) {
    check_accuracy({.queries = 70, .keys = 90}, {.scale = scale});
  }
}

TEST_CASE("causal masks, top left and bottom right, and key lengths") {
  const std::vector<int> lengths{40, 0, 131};
  for (const Index length : {1, 20, 131, 260}) {
    check_accuracy({.queries = length, .keys = length}, {}, CausalMask{});
    check_accuracy({.queries = length, .keys = length + 50}, {}, CausalMask{50});
    check_accuracy({.queries = length + 50, .keys = length}, {}, CausalMask{-50});
  }
  check_accuracy({.batch = 3, .queries = 100, .keys = 131}, {}, KeyLengthMask<int>{lengths.data()});
  check_accuracy({.batch = 3, .queries = 131, .keys = 131}, {},
                 BothMasks{CausalMask{}, KeyLengthMask<int>{lengths.data()}});
}

TEST_CASE("a query without keys gets 0, lse -inf and no gradient; a key without queries gets none") {
  Run<float> run({.queries = 40, .keys = 30});
  run.tiled({}, CausalMask{-25});  // queries 0 … 24 see nothing, keys 15 … 29 are never seen
  for (Index h = 0; h < 2; ++h) {
    for (Index i = 0; i < 40; ++i) {
      CHECK((run.lse[h * 40 + i] == -std::numeric_limits<double>::infinity()) == (i < 25));
      for (Index d = 0; d < 16; ++d) {
        CHECK((run.output[(h * 40 + i) * 16 + d] == 0) == (i < 25));
        CHECK((run.grad_q[(h * 40 + i) * 16 + d] == 0) ==
              (i < 26));  // a single key leaves nothing to choose: exactly 0
      }
    }
    for (Index j = 0; j < 30; ++j) CHECK((run.grad_v[(h * 30 + j) * 16] == 0) == (j >= 15));
  }
}

TEST_CASE("without keys or queries there is nothing but zeros") {
  Run<float> no_keys({.queries = 5, .keys = 0});
  no_keys.tiled();
  for (const float x : no_keys.output) CHECK(x == 0);
  for (const float x : no_keys.grad_q) CHECK(x == 0);
  Run<float> no_queries({.queries = 0, .keys = 5});
  no_queries.tiled();
  for (const float x : no_queries.grad_v) CHECK(x == 0);
}

TEST_CASE("the log-sum-exp is that of the scores") {
  Run<float> run({.queries = 50, .keys = 200, .amplitude = 5});
  run.tiled();
  for (Index i = 0; i < 50; ++i) {
    double sum = 0;
    for (Index j = 0; j < 200; ++j) {
      double score = 0;
      for (Index d = 0; d < 16; ++d) score += static_cast<double>(run.q[i * 16 + d]) * run.k[j * 16 + d];
      sum += std::exp(score / 4);
    }
    CHECK(run.lse[i] == Approx(std::log(sum)).epsilon(1e-6));
  }
}

TEST_CASE("one key: its weight is exactly 1 and no gradient reaches the scores") {
  Run<float> run({.queries = 9, .keys = 1, .amplitude = 20});
  run.tiled();
  for (Index i = 0; i < 9; ++i) {
    for (Index d = 0; d < 16; ++d) CHECK(run.output[i * 16 + d] == run.v[d]);
  }
  for (const float x : run.grad_q) CHECK(x == 0);
  for (const float x : run.grad_k) CHECK(x == 0);
}

TEST_CASE("NaN behind the valid keys changes no bit; NaN in front of it is not hidden") {
  const std::vector<int> lengths{101};
  const Problem p{.queries = 100, .keys = 131};
  Run<float> clean(p), poisoned(p);
  for (Index h = 0; h < 2; ++h) {
    for (Index j = 101; j < 131; ++j) {
      for (Index d = 0; d < 16; ++d) {
        poisoned.k[(h * 131 + j) * 16 + d] = poisoned.v[(h * 131 + j) * 16 + d] =
            std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  clean.tiled({}, KeyLengthMask<int>{lengths.data()});
  poisoned.tiled({}, KeyLengthMask<int>{lengths.data()});
  CHECK((clean.output == poisoned.output));
  CHECK((clean.lse == poisoned.lse));
  CHECK((clean.grad_q == poisoned.grad_q));
  CHECK((clean.grad_k == poisoned.grad_k));
  CHECK((clean.grad_v == poisoned.grad_v));
  poisoned.tiled();
  CHECK((std::bit_cast<std::uint32_t>(poisoned.output[0]) & 0x7fffffff) > 0x7f800000);  // also under -Ofast
}

#ifdef _OPENMP
TEST_CASE("results are bit-equal over reruns and for any number of workers", "[threads]") {
  for (const Index heads : {1, 2, 3, 5}) {
    for (const auto& p :
         {Problem{.heads = heads, .queries = 520, .keys = 520}, Problem{.heads = heads, .queries = 30, .keys = 700}}) {
      Run<float> serial(p);
      serial.tiled({}, CausalMask{200});
      for (const int threads : {1, 2, 3, 4}) {
        Run<float> parallel(p);
        parallel.tiled({}, CausalMask{200}, OpenMpExecutor{threads});
        CHECK((serial.output == parallel.output));
        CHECK((serial.lse == parallel.lse));
        CHECK((serial.grad_q == parallel.grad_q));
        CHECK((serial.grad_k == parallel.grad_k));
        CHECK((serial.grad_v == parallel.grad_v));
      }
    }
  }
}
#endif

/// Runs all tasks in turn, for as many workers as would have no two short heads in a run.
struct CrowdedExecutor : SerialExecutor {
  int workers() const { return 64; }
};

TEMPLATE_TEST_CASE("short heads have the same bits in runs of any length, in any layout", "[threads]", float,
                   Eigen::bfloat16) {
  constexpr Index kBatch = 3, kHeads = 23, kDim = 20;
  using Values = std::vector<TestType>;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  for (const Index length : {1, 5, 33, 62}) {
    Values inputs[4];
    for (Values& x : inputs) {
      x.resize(kBatch * kHeads * length * kDim);
      for (TestType& e : x) e = static_cast<TestType>(normal(generator));
    }
    for (const bool interleaved : {false, true}) {  // [B,L,H,D] instead of [B,H,L,D]
      const auto run = [&](const auto& executor) {
        std::array<Values, 4> results;
        std::vector<double> lse(kBatch * kHeads * length);
        for (Values& x : results) x.assign(inputs[0].size(), static_cast<TestType>(1e6F));
        const auto view = [&](auto& x) {
          auto dense = dense_view(x.data(), kBatch, kHeads, length, kDim);
          if (interleaved) dense.strides[1] = kDim, dense.strides[2] = kHeads * kDim;
          return dense;
        };
        auto& [q, k, v, grad] = inputs;
        auto& [output, grad_q, grad_k, grad_v] = results;
        const auto lse_view = dense_view(lse.data(), kBatch, kHeads, length, 1);
        attention_forward<TestType>({.q = view(q), .k = view(k), .v = view(v), .output = view(output), .lse = lse_view},
                                    {}, NoMask{}, executor);
        attention_backward<TestType>({.q = view(q),
                                      .k = view(k),
                                      .v = view(v),
                                      .output = view(output),
                                      .lse = lse_view,
                                      .grad_output = view(grad),
                                      .grad_q = view(grad_q),
                                      .grad_k = view(grad_k),
                                      .grad_v = view(grad_v)},
                                     {}, NoMask{}, executor);
        return std::pair(results, lse);
      };
      CAPTURE(length, interleaved);
      const auto apart = run(CrowdedExecutor{});
      CHECK((run(SerialExecutor{}) == apart));
#ifdef _OPENMP
      CHECK((run(OpenMpExecutor{2}) == apart));
      CHECK((run(OpenMpExecutor{3}) == apart));
#endif
    }
  }
}

TEST_CASE("any strides give the bits of dense tensors") {
  const Problem p{.batch = 2, .heads = 3, .queries = 100, .keys = 70, .dim = 20, .value_dim = 12};
  Run<float> dense(p);
  dense.tiled();
  // every order of the four dimensions, with gaps between the elements
  std::array<int, 4> order{0, 1, 2, 3};
  do {
    std::vector<std::vector<float>> storage;
    storage.reserve(8);
    const auto strided = [&](const std::vector<float>& from, Index length, Index dim) {
      TensorView<float> view{nullptr, {p.batch, p.heads, length, dim}, {}};
      Index stride = 2;
      for (int i = 3; i >= 0; --i) {
        view.strides[order[i]] = stride;
        stride *= view.shape[order[i]] + 1;
      }
      view.data = storage.emplace_back(stride, 1e6F).data();
      for (Index b = 0; b < p.batch; ++b)
        for (Index h = 0; h < p.heads; ++h)
          for (Index l = 0; l < length; ++l)
            for (Index d = 0; d < dim; ++d) view(b, h, l, d) = from[((b * p.heads + h) * length + l) * dim + d];
      return view;
    };
    const auto equal = [&](const TensorView<float>& view, const std::vector<float>& to) {
      for (Index b = 0; b < p.batch; ++b)
        for (Index h = 0; h < p.heads; ++h)
          for (Index l = 0; l < view.length(); ++l)
            for (Index d = 0; d < view.dim(); ++d)
              if (view(b, h, l, d) != to[((b * p.heads + h) * view.length() + l) * view.dim() + d]) return false;
      return true;
    };
    const auto q = strided(dense.q, 100, 20), k = strided(dense.k, 70, 20), v = strided(dense.v, 70, 12);
    const auto grad = strided(dense.grad, 100, 12), output = strided(dense.grad, 100, 12);
    const auto grad_q = strided(dense.q, 100, 20), grad_k = strided(dense.k, 70, 20), grad_v = strided(dense.v, 70, 12);
    std::vector<double> lse(dense.lse.size());
    const auto lse_view = dense_view(lse.data(), 2, 3, 100, 1);
    attention_forward<float>({.q = q, .k = k, .v = v, .output = output, .lse = lse_view});
    attention_backward<float>({.q = q,
                               .k = k,
                               .v = v,
                               .output = output,
                               .lse = lse_view,
                               .grad_output = grad,
                               .grad_q = grad_q,
                               .grad_k = grad_k,
                               .grad_v = grad_v});
    CAPTURE(order);
    CHECK(equal(output, dense.output));
    CHECK((lse == dense.lse));
    CHECK(equal(grad_q, dense.grad_q));
    CHECK(equal(grad_k, dense.grad_k));
    CHECK(equal(grad_v, dense.grad_v));
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("Eigen matrices, row- and column-major, are heads") {
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::MatrixXf q = Eigen::MatrixXf::Random(37, 16), k = Eigen::MatrixXf::Random(50, 16);
  const RowMajor v = Eigen::MatrixXf::Random(50, 10);
  RowMajor output(37, 10);
  attention_forward<float>(
      {.q = matrix_view(q), .k = matrix_view(k), .v = matrix_view(v), .output = matrix_view(output)});
  Eigen::MatrixXf weights = (q * k.transpose() / 4).array().exp();
  weights.array().colwise() /= weights.array().rowwise().sum().eval();
  CHECK((output - weights * v).cwiseAbs().maxCoeff() < 1e-6F);
}

TEST_CASE("the workspace of a worker stays below 1 MiB") {
  using Worker = core::detail::BackwardWorker<float>;
  for (const Index dim : {1, 16, 64, 256}) {
    CHECK(core::detail::ForwardWorker<float>::workspace_bytes(dim, dim) < (1 << 20));
    CHECK(Worker::workspace_bytes(dim, dim, {.softcap = 1}) < (1 << 20));
  }
  // With all tiles that terms may keep; the table is not read
  const auto own = [](auto score, auto, auto table) { return score + table(0); };
  const std::array<ScoreTable, 1> tables{};
  const AttentionParams all{.softcap = 1, .score_function = ScoreFunctionRef(own, tables)};
  CHECK(Worker::workspace_bytes(256, 256, all) < (1 << 20));
}

TEST_CASE("shapes that do not fit are named") {
  Run<float> run({.queries = 8, .keys = 9});
  const auto call = [&](Index keys, Index value_length) {
    return testing::error_of([&] {
      AttentionTensors<float> x = run.forward_tensors();
      x.k = run.of(run.k, keys, 16), x.v = run.of(run.v, value_length, 16);
      attention_forward(x);
    });
  };
  const Error error = call(9, 8);
  CHECK(error.id() == "headroom.core.attention.shape");
  CHECK(testing::contains(error.what(), "v has shape [1,2,8,16], expected [1,2,9,16]"));
  const Error scale = testing::error_of([&] { run.tiled({.scale = std::numeric_limits<double>::infinity()}); });
  CHECK(scale.id() == "headroom.core.attention.scale");
  const Error null_lse = testing::error_of([&] {
    AttentionBackwardTensors<float> x = run.backward_tensors();
    x.lse = {};
    attention_backward(x);
  });
  CHECK(testing::contains(null_lse.what(), "lse must be given"));
}
