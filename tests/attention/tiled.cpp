#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

TEST_CASE("tiled attention and all its gradients equal the reference in double") {
  for (const AttentionCase& request : attention_cases()) {
    INFO(request.name);
    check_same(run_case(request, AttentionBackend::tiled), run_case(request, AttentionBackend::reference), 1e-12);
  }
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
