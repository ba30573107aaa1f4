#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

Tensor noise(at::IntArrayRef shape) { return torch::randn(shape, torch::kDouble); }

}  // namespace

TEST_CASE("merged parts of the keys give attention over all of them, and its gradients") {
  torch::manual_seed(1);
  for (const auto backend : {AttentionBackend::chunked, AttentionBackend::reference, AttentionBackend::fused}) {
    INFO(backend);
    const Tensor q = noise({2, 3, 9, 4}).requires_grad_(), k = noise({2, 3, 20, 4}).requires_grad_(),
                 v = noise({2, 3, 20, 5}).requires_grad_(), weight = noise({2, 3, 9, 5}), lse_weight = noise({2, 3, 9});
    const auto options = AttentionOptions().backend(backend);
    const auto part = [&](int64_t begin, int64_t end) {
      return attention_with_lse(q, k.slice(2, begin, end), v.slice(2, begin, end), options);
    };
    const AttentionResult merged = merge_attention({part(0, 3), part(3, 4), part(4, 20)}), whole = part(0, 20);
    CHECK(largest(merged.output - whole.output) < 1e-13);
    CHECK(largest(merged.lse - whole.lse) < 1e-13);
    const auto gradients = [&](const AttentionResult& result) {
      return torch::autograd::grad({(result.output * weight).sum() + (result.lse * lse_weight).sum()}, {q, k, v});
    };
    const auto given = gradients(merged), expected = gradients(whole);
    for (size_t i = 0; i < expected.size(); ++i) CHECK(largest(given[i] - expected[i]) < 1e-12);
  }
}

TEST_CASE("parts without keys change nothing; without any keys a query gets 0 and -inf") {
  torch::manual_seed(2);
  const Tensor q = noise({2, 3, 9, 4}).requires_grad_(), k = noise({2, 3, 6, 4}).requires_grad_(),
               v = noise({2, 3, 6, 5}).requires_grad_();
  const auto options = AttentionOptions().backend(AttentionBackend::chunked);
  const auto part = [&](int64_t first, int64_t second) {
    return attention_with_lse(q, k, v, AttentionOptions(options).key_lengths(torch::tensor({first, second})));
  };
  const auto [output, lse] = merge_attention({part(0, 0), part(6, 0)});
  CHECK(output[0].equal(part(6, 0).output[0]));
  CHECK(largest(lse[0] - part(6, 0).lse[0]) < 1e-14);
  CHECK(output[1].equal(torch::zeros({3, 9, 5}, torch::kDouble)));
  CHECK(lse[1].equal(torch::full({3, 9}, -INFINITY, torch::kDouble)));
  (output.sum() + lse[0].sum()).backward();
  for (const Tensor& x : {q, k, v}) {
    CHECK(x.grad().isfinite().all().item<bool>());
    CHECK(largest(x.grad()[1]) == 0);
  }
}

TEST_CASE("bfloat16 parts are merged in float, and large scores do not overflow") {
  torch::manual_seed(3);
  const Tensor q = torch::randn({1, 2, 9, 4}) * 30, k = torch::randn({1, 2, 20, 4}) * 30,
               v = torch::randn({1, 2, 20, 4});
  const auto run = [&](torch::ScalarType dtype, int64_t begin, int64_t end) {
    return attention_with_lse(q.to(dtype), k.to(dtype).slice(2, begin, end), v.to(dtype).slice(2, begin, end),
                              AttentionOptions().backend(AttentionBackend::chunked));
  };
  const auto merged = merge_attention({run(torch::kBFloat16, 0, 10), run(torch::kBFloat16, 10, 20)});
  CHECK(merged.output.scalar_type() == torch::kBFloat16);
  CHECK(merged.lse.scalar_type() == torch::kFloat);
  CHECK(largest(merged.output - run(torch::kBFloat16, 0, 20).output) < 0.03);  // two roundings to eight bits
  CHECK(largest(merged.lse - run(torch::kBFloat16, 0, 20).lse) < 1e-3);
  const auto exact = merge_attention({run(torch::kFloat, 0, 10), run(torch::kFloat, 10, 20)});
  CHECK(largest(exact.output - run(torch::kFloat, 0, 20).output) < 1e-5);
}

TEST_CASE("parts that do not belong together are refused") {
  const auto message = [](const std::vector<AttentionResult>& parts) {
    const Error error = error_of([&] { merge_attention(parts); });
    CHECK(error.id() == "headroom.attention.merge");
    return std::string(error.what());
  };
  const AttentionResult part{torch::zeros({2, 3, 4}), torch::zeros({2, 3})};
  CHECK(contains(message({}), "no parts"));
  CHECK(contains(message({part, {part.output, Tensor()}}), "lacks its output or its log-sum-exp"));
  CHECK(contains(message({part, {torch::zeros({2, 4, 4}), torch::zeros({2, 4})}}), "[2, 4, 4]"));
  CHECK(contains(message({{part.output, torch::zeros({2, 4})}}), "log-sum-exp [2, 4]"));
  CHECK(contains(message({part, {part.output.to(torch::kDouble), part.lse}}), "double"));
}
