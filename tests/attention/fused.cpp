#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

/// True if the backend refuses a request, by the right error.
bool refused(const AttentionCase& request, AttentionBackend backend) {
  try {
    attention(request.q, request.k, request.v, AttentionOptions(request.options).backend(backend));
  } catch (const Error& error) {
    CHECK(error.id() == "headroom.attention.backend");
    CHECK(contains(error.what(), "chunked, reference"));
    return true;
  }
  return false;
}

}  // namespace

TEST_CASE("fused attention equals the reference in double, or is refused") {
  std::vector<std::string> served;
  for (const AttentionCase& request : attention_cases()) {
    if (refused(request, AttentionBackend::fused)) continue;
    INFO(request.name);
    served.push_back(request.name);
    AttentionCase constant = request;  // a bias without gradient
    AttentionValues fused = run_case(constant, AttentionBackend::fused);
    check_same(fused, run_case(constant, AttentionBackend::reference), 1e-12);
  }
  for (const auto& name : served) WARN(name);
}
