#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

TEST_CASE("tiled attention and all its gradients equal the reference in double") {
  for (const AttentionCase& request : attention_cases()) {
    INFO(request.name);
    check_same(run_case(request, AttentionBackend::tiled), run_case(request, AttentionBackend::reference), 1e-12);
  }
}

TEST_CASE("LibTorch's bfloat16 products are the same before and after attention in the same thread") {
  // both may use a unit of the processor that has to be configured
  const auto noise = [](at::IntArrayRef sizes) { return torch::randn(sizes).to(torch::kBFloat16); };
  const Tensor a = noise({96, 160}), b = noise({160, 80}), q = noise({1, 2, 70, 40});
  const Tensor before = torch::matmul(a, b), attended = attention(q, q, q);
  CHECK(torch::equal(torch::matmul(a, b), before));
  CHECK(torch::equal(attention(q, q, q), attended));
}

TEST_CASE("tiled attention errs no more than the rule allows in float, bfloat16 and half") {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    AccuracyRule rule(AttentionBackend::tiled, dtype);
    for (const AttentionCase& request : attention_cases()) {
      INFO(dtype << ", " << request.name);
      rule.check(request);
    }
  }
}
