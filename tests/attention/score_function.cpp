// Score and mask functions of one's own on tensors: beside the built-in options, their tables, who refuses them.

#include <torch/torch.h>

#include <algorithm>

#include "headroom/attention.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

/// Outputs and gradients of q, k, v and `learned`, in double.
std::vector<Tensor> own_results(const std::vector<Tensor>& qkv, const std::vector<Tensor>& learned,
                                const AttentionOptions& options) {
  std::vector<Tensor> leaves = qkv;
  leaves.insert(leaves.end(), learned.begin(), learned.end());
  const Tensor output = attention(qkv[0], qkv[1], qkv[2], options);
  auto results = torch::autograd::grad({output.to(torch::kDouble).square().sum()}, leaves);
  results.push_back(output.detach());
  for (Tensor& x : results) x = x.to(torch::kDouble);
  return results;
}

/// Relative to the largest element of a result, or to 1.
double largest_own_difference(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double size = std::max(1.0, b[i].abs().max().item<double>());
    largest = std::max(largest, testing::largest_difference(a[i], b[i]) / size);
  }
  return largest;
}

/// A window to the left as a range of keys, and pair by pair.
struct LeftWindow {
  int64_t reach;
  core::KeyRange keys(int64_t, int64_t, int64_t query) const { return {query - reach, query + 1}; }
};
struct LeftWindowOfPairs {
  int64_t reach;
  template <class Scalar>
  core::LaneMask<Scalar> operator()(const core::ScorePlace<Scalar>& at) const {
    return at.query >= at.key && at.query - at.key <= reach;
  }
};

}  // namespace

TEST_CASE("score functions on tensors are the options they stand for, in values and gradients") {
  torch::manual_seed(41);
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    const double tolerance = dtype == torch::kDouble ? 1e-11 : dtype == torch::kFloat ? 1e-5 : 0.02;
    const auto learned = [&](at::IntArrayRef sizes) {
      return torch::randn(sizes, torch::kDouble).to(dtype).requires_grad_();
    };
    const std::vector<Tensor> qkv{learned({2, 3, 4, 37, 6}), learned({2, 1, 2, 53, 6}), learned({2, 1, 2, 53, 5})};
    const Tensor slopes = learned({4, 1}), table = learned({4, 41}), bias = learned({3, 1, 1, 53});
    const auto causal = AttentionOptions().causal(true).query_offset(16);
    const auto alibi = [](auto score, auto at, auto slope) { return score - slope(at.head) * abs(at.distance); };
    CHECK(
        largest_own_difference(
            own_results(qkv, {slopes}, AttentionOptions(causal).score_function(ScoreFunction(alibi, slopes.flatten()))),
            own_results(qkv, {slopes}, AttentionOptions(causal).alibi_slopes(slopes))) < tolerance);
    const auto relative = [](auto score, auto at, auto bias) { return score + bias(at.head, at.distance + 20); };
    CHECK(largest_own_difference(
              own_results(qkv, {table}, AttentionOptions(causal).score_function(ScoreFunction(relative, table))),
              own_results(qkv, {table}, AttentionOptions(causal).relative_bias(table))) < tolerance);
    // Batch dimensions count as one
    const auto of_batch = [](auto score, auto at, auto bias) { return score + bias(at.batch, at.key); };
    const Tensor by_batch = bias.view({1, 3, 53}).expand({2, 3, 53}).flatten(0, 1);
    CHECK(largest_own_difference(
              own_results(qkv, {bias}, AttentionOptions(causal).score_function(ScoreFunction(of_batch, by_batch))),
              own_results(qkv, {bias}, AttentionOptions(causal).bias(bias))) < tolerance);
    const Tensor output = attention(qkv[0], qkv[1], qkv[2], causal, [](auto s, auto) { return 3 * tanh(s / 3); });
    const Tensor capped = attention(qkv[0], qkv[1], qkv[2], AttentionOptions(causal).softcap(3));
    CHECK(largest_own_difference({output.to(torch::kDouble)}, {capped.to(torch::kDouble)}) < tolerance);
  }
}

TEST_CASE("mask functions on tensors: ranges and pairs, beside other masks") {
  torch::manual_seed(42);
  const auto learned = [&](at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble).requires_grad_(); };
  const std::vector<Tensor> qkv{learned({2, 4, 60, 6}), learned({2, 4, 60, 6}), learned({2, 4, 60, 6})};
  const auto lengths = AttentionOptions().key_lengths(torch::tensor({60, 31}));
  const auto expected = own_results(qkv, {}, AttentionOptions(lengths).window(AttentionWindow{7, 0}));
  CHECK(largest_own_difference(own_results(qkv, {}, AttentionOptions(lengths).mask_function(LeftWindow{7})),
                               expected) == 0);
  CHECK(largest_own_difference(own_results(qkv, {}, AttentionOptions(lengths).mask_function(LeftWindowOfPairs{7})),
                               expected) < 1e-12);
}

TEST_CASE("functions of one's own are the tiled backend's: others refuse them, and tables are checked") {
  const Tensor q = torch::randn({1, 2, 5, 4});
  const auto plus = [](auto score, auto, auto table) { return score + table(0); };
  const auto id = [&](const AttentionOptions& options) {
    return headroom::testing::error_of([&] { attention(q, q, q, options); }).id();
  };
  const auto with = [&](const Tensor& table) { return AttentionOptions().score_function(ScoreFunction(plus, table)); };
  for (const auto backend : {AttentionBackend::chunked, AttentionBackend::fused, AttentionBackend::reference}) {
    CHECK(id(with(torch::zeros({1})).backend(backend)) == "headroom.attention.backend");
    CHECK(id(AttentionOptions().mask_function(LeftWindow{1}).backend(backend)) == "headroom.attention.backend");
  }
  const auto error = headroom::testing::error_of([&] { attention_weights(q, q, with(torch::zeros({1}))); });
  CHECK(headroom::testing::contains(error.what(), "the backend chunked does not serve score_function"));
  for (const Tensor& table : {torch::zeros({1}, torch::kLong), torch::zeros({0}), torch::zeros({1, 1, 1}), Tensor(),
                              torch::zeros({1}, torch::kMeta)}) {
    CHECK(id(with(table)) == "headroom.attention.score_function");
  }
  CHECK(attention(q, q, q, with(torch::zeros({1}, torch::kDouble))).equal(attention(q, q, q, with(torch::zeros({1})))));
}
