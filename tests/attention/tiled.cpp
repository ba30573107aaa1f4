#include "headroom/memory.hpp"
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

TEST_CASE("no option makes tiled attention ask for more than the tensors and 1 MiB a thread") {
  const int64_t length = 1500, heads = 2, dim = 16;
  const auto make = [&](at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); };
  const Tensor starts = torch::tensor({0, 400, 1000, 1500});
  const Tensor angles = torch::rand({length, dim / 2});
  const Tensor bias = make({length, length}), relative = make({heads, 2 * length - 1}), slopes = make({heads, length});
  using O = AttentionOptions;
  struct Case {
    const char* name;
    AttentionOptions options;
    int64_t extra_bytes = 0;  // gradients of what is added to scores, in what they are summed and returned in
  };
  const std::vector<Case> cases{
      {"plain", O()},
      {"causal", O().causal(true)},
      {"window", O().window(AttentionWindow{100, 50})},
      {"key lengths", O().key_lengths(torch::tensor({1000}))},
      {"sequences", O().sequence_starts(starts)},
      {"mask", O().mask(torch::rand({length, length}) > 0.5)},
      {"block mask", O().block_mask(torch::rand({12, 12}) > 0.5)},
      {"bias", O().bias(bias.detach())},
      {"bias with gradient", O().bias(bias), bias.numel() * 4},
      {"relative bias", O().relative_bias(relative), relative.numel() * (8 + 4)},
      {"slopes", O().alibi_slopes(slopes), slopes.numel() * (8 + 4)},
      {"softcap", O().softcap(20)},
      {"sink", O().sink(make({heads})), heads * (8 + 4)},
      {"rotary", O().rotary(torch::polar(torch::ones_like(angles), angles))},
      {"dropout", O().dropout(0.1)},
  };
  for (const auto& [name, options, extra_bytes] : cases) {
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      if (options.bias().has_value() && dtype == torch::kBFloat16) continue;  // summed in float: one more L x L
      INFO(name << ", " << dtype);
      const int64_t element = dtype == torch::kFloat ? 4 : 2, tensor = heads * length * dim * element;
      // o, do, dq, dk, dv and the log-sum-exp in double; q, k, v are there before
      const int64_t floor = 5 * tensor + heads * length * (8 + 4);
      const auto leaf = [&] { return torch::randn({1, heads, length, dim}).to(dtype).requires_grad_(); };
      const Tensor q = leaf(), k = leaf(), v = leaf();
      MemoryMeter meter;
      const MemoryReport memory = meter.measure([&] {
        const Tensor output = attention(q, k, v, O(options).backend(AttentionBackend::tiled));
        output.backward(torch::ones_like(output));
      });
      CHECK(memory.added_peak() <= floor + extra_bytes + torch::get_num_threads() * (1 << 20));
      for (const Tensor& x : {bias, relative, slopes}) x.mutable_grad() = Tensor();
    }
  }
}
