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

/// Requests that fused kernels serve.
std::vector<AttentionCase> fused_cases() {
  std::vector<AttentionCase> served;
  for (AttentionCase& request : attention_cases()) {
    request.bias_has_gradient = false;
    if (!refused(request, AttentionBackend::fused)) served.push_back(request);
  }
  return served;
}

}  // namespace

TEST_CASE("fused attention equals the reference in double, or is refused") {
  std::string names;
  for (const AttentionCase& request : fused_cases()) {
    INFO(request.name);
    names += request.name + "; ";
    check_same(run_case(request, AttentionBackend::fused), run_case(request, AttentionBackend::reference), 1e-12);
  }
  CHECK(names ==
        "plain; scale; causal; global keys without a window; bias; bias of heads; bias of keys; bias of queries; bias "
        "for "
        "all; bias that hides; polar; no values; ");
}

TEST_CASE("fused attention in narrow dtypes errs no more than the rule allows") {
  AccuracyRule in_bfloat(AttentionBackend::fused, torch::kBFloat16), in_float(AttentionBackend::fused, torch::kFloat);
  for (const AttentionCase& request : fused_cases()) {
    INFO(request.name);
    in_bfloat.check(request);
    // LibTorch's kernel recomputes weights from a log-sum-exp in float: its gradients in float miss the rule
    in_float.check(request, /*gradients=*/false);
  }
}

TEST_CASE("fused attention split into several calls gives the values of one") {
  torch::manual_seed(1);
  const Tensor q = torch::randn({3, 5, 4, 20, 8}, torch::kDouble), k = torch::randn({3, 5, 4, 30, 8}, torch::kDouble),
               v = torch::randn({3, 5, 4, 30, 6}, torch::kDouble), bias = torch::randn({5, 1, 20, 30}, torch::kDouble),
               grad = torch::randn({3, 5, 4, 20, 6}, torch::kDouble),
               grad_lse = torch::randn({3, 5, 4, 20}, torch::kDouble);
  const auto request = headroom::detail::AttentionRequest::check(q, k, v, AttentionOptions().bias(bias));
  const headroom::detail::FusedAttention whole({q, k, v, request});
  const auto expected = whole.forward();
  const auto expected_grad = whole.backward(expected, {grad, grad_lse});
  CHECK(expected.extra.size() == 3);
  for (const auto& [limit, calls] : {std::pair<int64_t, size_t>{9, 9}, {4, 15}, {3, 30}}) {
    const headroom::detail::FusedAttention split({q, k, v, request}, limit);
    const auto result = split.forward();
    CHECK(result.extra.size() == calls);
    CHECK(largest(result.output - expected.output) < 1e-14);
    CHECK(largest(result.lse - expected.lse) < 1e-14);
    const auto result_grad = split.backward(result, {grad, grad_lse});
    CHECK(largest(result_grad.q - expected_grad.q) < 1e-14);
    CHECK(largest(result_grad.k - expected_grad.k) < 1e-14);
    CHECK(largest(result_grad.v - expected_grad.v) < 1e-14);
  }
}

TEST_CASE("fused attention takes strided inputs") {
  torch::manual_seed(2);
  const Tensor q = torch::randn({2, 6, 4, 9}).transpose(1, 3), k = torch::randn({2, 11, 9, 6}).transpose(1, 2),
               v = torch::randn({1, 9, 11, 3}).expand({2, 9, 11, 3});
  const AttentionCase strided{"", q.to(torch::kDouble), k.to(torch::kDouble), v.to(torch::kDouble), {}, true};
  check_same(run_case(strided, AttentionBackend::fused), run_case(strided, AttentionBackend::reference), 1e-13);
}

TEST_CASE("fused attention takes rows that overlap, expanded rows and gradients") {
  torch::manual_seed(4);
  const Tensor row = torch::randn({64}, torch::kDouble);
  const Tensor q = row.as_strided({1, 2, 7, 8}, {20, 10, 1, 1}), k = row.as_strided({1, 2, 9, 8}, {16, 8, 0, 1}),
               v = torch::randn({1, 2, 9, 4}, torch::kDouble);
  const AttentionCase overlapping{"", q, k, v, {}, true}, one_query{"", q.narrow(2, 0, 1), k, v, {}, true};
  for (const AttentionCase& request : {overlapping, one_query}) {
    check_same(run_case(request, AttentionBackend::fused), run_case(request, AttentionBackend::reference), 1e-13);
  }
  const auto gradient = [&](AttentionBackend backend) {
    const Tensor leaf = v.detach().requires_grad_();
    const Tensor output = attention(q, k, leaf, AttentionOptions().backend(backend));
    return torch::autograd::grad({output}, {leaf}, {row.slice(0, 0, 4).expand_as(output)})[0];
  };
  CHECK(largest(gradient(AttentionBackend::fused) - gradient(AttentionBackend::reference)) < 1e-13);
}

TEST_CASE("fused attention takes heads that lie innermost, padded") {
  torch::manual_seed(5);
  const auto heads_innermost = [](int64_t length, int64_t dim) {
    return torch::randn({3, length, dim, 2}, torch::kDouble).permute({0, 3, 1, 2});
  };
  const AttentionCase wide{"", heads_innermost(4, 8), heads_innermost(5, 8), heads_innermost(5, 3), {}, true};
  check_same(run_case(wide, AttentionBackend::fused), run_case(wide, AttentionBackend::reference), 1e-13);
}

TEST_CASE("fused attention with a bias that leaves the logarithm of a sum no digits") {
  torch::manual_seed(6);
  const Tensor q = torch::randn({1, 2, 7, 8}, torch::kDouble), k = torch::randn({1, 2, 9, 8}, torch::kDouble),
               v = torch::randn({1, 2, 9, 4}, torch::kDouble);
  for (const double bias : {-1e9, 1e300, std::numeric_limits<double>::lowest()}) {
    AttentionCase padded{"", q, k, v, AttentionOptions().bias(torch::full({1, 9}, bias, torch::kDouble)), false};
    check_same(run_case(padded, AttentionBackend::fused), run_case(padded, AttentionBackend::reference), 1e-6);
  }
}

TEST_CASE("a bias hides all keys that the first queries see with causal") {
  const Tensor q = torch::randn({1, 1, 5, 4}, torch::kDouble), bias = torch::zeros({5, 5}, torch::kDouble);
  bias.slice(1, 0, 2).fill_(-INFINITY);
  const auto options = AttentionOptions().causal(true).bias(bias);
  const auto fused = attention_with_lse(q, q, q, AttentionOptions(options).backend(AttentionBackend::fused));
  const auto expected = attention_with_lse(q, q, q, AttentionOptions(options).backend(AttentionBackend::reference));
  CHECK(fused.lse.slice(2, 0, 2).eq(-INFINITY).all().item<bool>());
  CHECK(largest(fused.lse.slice(2, 2) - expected.lse.slice(2, 2)) < 1e-14);
  CHECK(largest(fused.output - expected.output) < 1e-14);
}

TEST_CASE("a scale of 0 or below with causal is refused by fused attention, not NaN") {
  const Tensor q = torch::randn({1, 2, 6, 8});
  for (const double scale : {0.0, -0.5}) {
    const AttentionCase causal{"", q, q, q, AttentionOptions().causal(true).scale(scale), true};
    CHECK(refused(causal, AttentionBackend::fused));
    CHECK(attention(q, q, q, AttentionOptions(causal.options)).isfinite().all().item<bool>());
  }
}

TEST_CASE("a NaN behind the causal mask does not leak out of fused attention") {
  torch::manual_seed(3);
  const Tensor q = torch::randn({1, 2, 9, 4}), clean = torch::randn({1, 2, 9, 4});
  Tensor k = clean.clone(), v = clean.clone();
  k.slice(2, 6, 7).fill_(std::nan("")), v.slice(2, 7, 8).fill_(INFINITY);
  const auto causal = AttentionOptions().causal(true).backend(AttentionBackend::fused);
  const auto values = [&](const Tensor& keys, const Tensor& values) {
    const Tensor a = q.detach().requires_grad_(), b = keys.detach().requires_grad_(),
                 c = values.detach().requires_grad_();
    const Tensor output = attention(a, b, c, causal);
    output.slice(2, 0, 6).square().sum().backward();
    return std::vector<Tensor>{output.slice(2, 0, 6).detach(), a.grad().slice(2, 0, 6)};
  };
  const auto with_nan = values(k, v), without = values(clean, clean);
  for (size_t i = 0; i < without.size(); ++i) CHECK(largest(with_nan[i] - without[i]) < 1e-5);
  CHECK(attention(q, k, v, causal).slice(2, 6).isnan().all().item<bool>());

  const Tensor hidden = torch::ones({9, 9}, torch::kBool).triu(1), bias = torch::randn({9, 9});
  for (const double value : {std::nan(""), double{INFINITY}}) {
    const auto with_bias = [&](const Tensor& x) {
      return attention(q, clean, clean, AttentionOptions(causal).bias(x));
    };
    CHECK(largest(with_bias(bias.masked_fill(hidden, value)) - with_bias(bias)) < 1e-6);
  }
}

TEST_CASE("a refusal names what is not served and who serves it") {
  const Tensor q = torch::randn({1, 4, 6, 8}), k = torch::randn({1, 2, 6, 8});
  const auto message = [&](const AttentionOptions& options) {
    return std::string(
        error_of([&] { attention(q, k, k, AttentionOptions(options).backend(AttentionBackend::fused)); }).what());
  };
  const auto given = message(AttentionOptions().window(AttentionWindow{1, 1}).softcap(3.0));
  CHECK(contains(given, "the backend fused does not serve fewer heads of k and v than of q, window, softcap; "));
  CHECK(contains(given, "chunked, reference"));
  CHECK(contains(message(AttentionOptions().bias(torch::zeros({6, 6}).requires_grad_())), "bias with a gradient"));
  CHECK(contains(message(AttentionOptions().causal(true).query_offset(2)), "query_offset with causal"));
}
