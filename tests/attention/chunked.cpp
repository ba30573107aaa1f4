#include "headroom/memory.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

TEST_CASE("chunked attention and all its gradients equal the reference in double") {
  for (const AttentionCase& request : attention_cases()) {
    INFO(request.name);
    check_same(run_case(request, AttentionBackend::chunked), run_case(request, AttentionBackend::reference), 1e-12);
  }
}
