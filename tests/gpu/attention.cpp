#include "headroom/attention.hpp"

#include <algorithm>
#include <map>
#include <sstream>

#include "gpu/device.hpp"
#include "headroom/memory.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;
using torch::Tensor;

namespace {

/// attention_cases(), what fused kernels of a GPU serve too, and cases with a bias once more with one that needs no
/// gradient.
std::vector<AttentionCase> all_cases() {
  std::vector<AttentionCase> all = attention_cases(), fixed;
  const auto noise = [](at::IntArrayRef shape) { return torch::randn(shape, torch::kDouble); };
  const auto square = [&](const std::string& name, const AttentionOptions& options) {
    all.push_back({name, noise({2, 4, 64, 16}), noise({2, 4, 64, 16}), noise({2, 4, 64, 16}), options});
  };
  square("square", AttentionOptions());
  square("square, causal", AttentionOptions().causal(true));
  square("square, bias", AttentionOptions().bias(noise({4, 64, 64})));
  square("square, bias for all", AttentionOptions().bias(noise({64, 64})));
  for (const AttentionCase& request : all) {
    if (!request.options.bias().has_value()) continue;
    fixed.push_back(request);
    fixed.back().name += ", fixed";
    fixed.back().bias_has_gradient = false;
  }
  all.insert(all.end(), fixed.begin(), fixed.end());
  return all;
}

/// Whether a backend serves a request on the tests' device.
bool serves(const AttentionCase& request, AttentionBackend backend) {
  AttentionOptions options = AttentionOptions(request.options).backend(backend);
  if (options.bias().has_value()) options.bias(options.bias()->detach().requires_grad_(request.bias_has_gradient));
  try {
    attention(request.q, request.k, request.v, options);
    return true;
  } catch (const Error& error) {
    if (error.id() != "headroom.attention.backend") throw;
    return false;
  }
}

/// Error of `ours` against `exact`, relative to its size: root mean square and largest.
struct Deviation {
  double rms = 0, largest = 0;
};
Deviation deviation(const Tensor& ours, const Tensor& exact) {
  const Tensor error = (ours.cpu().to(torch::kDouble) - exact.cpu()).masked_fill(ours.cpu() == exact.cpu(), 0);
  return {rms(error), largest(error)};
}

/// What an accurate kernel may be off: the rule of the reference in the same dtype, or a few roundings of that dtype.
/// A few numbers, sums of thousands that nearly cancel, make no statistic.
void check_accuracy(const AttentionValues& ours, const AttentionValues& naive, const AttentionValues& exact,
                    torch::ScalarType dtype) {
  const double rounding = dtype == torch::kFloat ? 6e-8 : dtype == torch::kHalf ? 4.9e-4 : 3.9e-3;
  for (size_t i = 0; i < exact.names.size(); ++i) {
    INFO(exact.names[i]);
    REQUIRE(ours.values[i].sizes() == exact.values[i].sizes());
    CHECK(ours.values[i].scalar_type() == naive.values[i].scalar_type());
    const Deviation mine = deviation(ours.values[i], exact.values[i]),
                    theirs = deviation(naive.values[i], exact.values[i]);
    if (exact.values[i].numel() < 64) {
      CHECK(mine.largest <= 4 * theirs.largest + 50 * rounding * std::max(1.0, largest(exact.values[i])));
      continue;
    }
    CHECK(mine.rms <= 2 * theirs.rms + 4 * rounding * rms(exact.values[i]));
    CHECK(mine.largest <= 4 * theirs.largest + 4 * rounding * largest(exact.values[i]));
  }
}

}  // namespace

TEST_CASE("every attention option on the device, forward and backward, against double on the CPU", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  std::map<std::string, int> served;
  for (const AttentionCase& request : all_cases()) {
    for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      const AttentionCase narrow = converted(request, dtype);
      const AttentionValues exact = run_case(converted(narrow, torch::kDouble), AttentionBackend::reference, false);
      const AttentionValues naive = run_case(narrow, AttentionBackend::reference, false);
      const AttentionCase there = moved(narrow, test_device());
      for (const auto backend : {AttentionBackend::automatic, AttentionBackend::fused, AttentionBackend::chunked}) {
        std::ostringstream label;
        label << request.name << ", " << dtype << ", " << backend;
        INFO(label.str());
        if (backend == AttentionBackend::fused && !serves(there, backend)) continue;
        ++served[label.str().substr(label.str().rfind(' ') + 1)];
        try {
          check_accuracy(run_case(there, backend, false), naive, exact, dtype);
        } catch (const std::exception& error) {
          FAIL_CHECK(error.what());
        }
      }
    }
  }
  CHECK(served["fused"] >= 10);
  CHECK(served["automatic"] == served["chunked"]);
}

TEST_CASE("the log-sum-exp and its gradient on the device", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  for (const AttentionCase& request : attention_cases()) {
    const AttentionCase narrow = converted(request, torch::kFloat);
    const AttentionValues exact = run_case(converted(narrow, torch::kDouble), AttentionBackend::reference);
    const AttentionValues naive = run_case(narrow, AttentionBackend::reference);
    INFO(request.name);
    try {
      check_accuracy(run_case(moved(narrow, test_device()), AttentionBackend::automatic), naive, exact, torch::kFloat);
    } catch (const std::exception& error) {
      FAIL_CHECK(error.what());
    }
  }
}

TEST_CASE("thousands of queries and keys on the device", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  torch::manual_seed(21);
  for (const int64_t length : {1000, 4096, 8193}) {
    for (const bool causal : {false, true}) {
      AttentionCase request{"long", {}, {}, {}, AttentionOptions().causal(causal)};
      for (Tensor* x : {&request.q, &request.k, &request.v}) *x = torch::randn({1, 2, length, 64}, torch::kDouble);
      for (const auto dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
        const AttentionCase there = moved(converted(request, dtype), test_device());
        // stored scores, in double and in the dtype, on the device too: they are LibTorch's plain operators
        const AttentionValues exact = run_case(converted(there, torch::kDouble), AttentionBackend::reference, false);
        const AttentionValues naive = run_case(there, AttentionBackend::reference, false);
        for (const auto backend : {AttentionBackend::fused, AttentionBackend::chunked}) {
          std::ostringstream label;
          label << length << (causal ? ", causal, " : ", ") << dtype << ", " << backend;
          INFO(label.str());
          check_accuracy(run_case(there, backend, false), naive, exact, dtype);
        }
      }
    }
  }
}

TEST_CASE("more batches times heads than a grid dimension of CUDA", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  torch::manual_seed(22);
  AttentionCase request{"many", {}, {}, {}, AttentionOptions()};
  for (Tensor* x : {&request.q, &request.k, &request.v}) *x = torch::randn({35000, 2, 5, 8}, torch::kDouble);
  const AttentionValues exact = run_case(request, AttentionBackend::reference, false);
  const AttentionCase narrow = converted(request, torch::kFloat);
  const AttentionValues naive = run_case(narrow, AttentionBackend::reference, false);
  for (const auto backend : {AttentionBackend::automatic, AttentionBackend::fused, AttentionBackend::chunked}) {
    INFO(backend);
    check_accuracy(run_case(moved(narrow, test_device()), backend, false), naive, exact, torch::kFloat);
  }
}

TEST_CASE("attention on the device stores no scores", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  const int64_t heads = 4, length = 8193, dim = 64;
  const auto options = torch::TensorOptions(test_device());
  // in memory as a model's projections give them, so that no kernel's result is in another order
  const auto make = [&] { return torch::randn({1, length, heads, dim}, options).transpose(1, 2); };
  const int64_t tensor = heads * length * dim * 4, row = heads * length * 8;
  for (const auto backend : {AttentionBackend::fused, AttentionBackend::chunked}) {
    INFO(backend);
    const Tensor q = make().requires_grad_(), k = make().requires_grad_(), v = make().requires_grad_(), grad = make();
    attention(q, k, v, AttentionOptions().backend(backend)).backward(grad);  // libraries make their workspace
    for (const Tensor& x : {q, k, v}) x.mutable_grad() = Tensor();
    MemoryMeter meter(test_device());
    Tensor output;
    const MemoryReport forward =
        meter.measure([&] { output = attention(q, k, v, AttentionOptions().backend(backend)); });
    const MemoryReport backward = meter.measure([&] { output.backward(grad); });
    const int64_t scratch = int64_t{160} << 20;  // of chunks, whatever the length
    CHECK(forward.held() <= tensor + 2 * row + (1 << 16));
    CHECK(forward.added_peak() <= tensor + 4 * row + (backend == AttentionBackend::chunked ? scratch : 0) + (1 << 16));
    // three gradients, delta, and what kernels sum in float
    CHECK(backward.added_peak() <= 5 * tensor + 4 * row + (backend == AttentionBackend::chunked ? scratch : 0));
    CHECK(heads * length * length * 4 > 6 * tensor + scratch);  // stored scores would show
  }
}
