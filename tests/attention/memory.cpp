#include "headroom/memory.hpp"

#include "benchmarks/attention_capabilities.hpp"
#include "headroom/nn/rotary.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"

using namespace headroom;
using namespace headroom::benchmarks;

namespace {

/// Two threads, whatever the machine has, so that the bar is below the size of any tensor.
struct TwoThreads {
  int before = torch::get_num_threads();
  TwoThreads() { torch::set_num_threads(2); }
  ~TwoThreads() { torch::set_num_threads(before); }
};

/// What docs/020_attention.md says about sums in float: half of them for the gradient of q, where it is stored in 16
/// bits, for each thread (and the family of heads that two threads split) and each head that shares keys.
int64_t sum_bytes(const AttentionStep& step) {
  if (step.q.element_size() >= 4) return 0;
  const int64_t families = step.q.numel() / (step.q.size(-3) * step.q.size(-2) * step.q.size(-1)) * step.k.size(-3);
  return (2 + families % 2) * (step.q.size(-3) / step.k.size(-3)) * step.q.size(-2) * step.q.size(-1) * 2;
}

}  // namespace

TEST_CASE("nothing that attention can be asked for takes more than the floor, documented sums and 1 MiB a thread") {
  const TwoThreads threads;
  for (const int64_t heads : {4, 1}) {
    const AttentionSizes sizes{.batch = 1, .heads = heads, .length = 1100, .head_dim = 128};  // 550 KiB a head
    for (const auto& [name, make] : attention_capabilities()) {
      INFO(heads << " heads, " << name);
      torch::manual_seed(1);
      const AttentionStep step = make(sizes);
      const MemoryMeter meter;
      std::vector<Tensor> results;
      const MemoryReport forward = meter.measure([&] { results = step.forward(); });
      CHECK(forward.added_peak() - step.floor_bytes(/*with_backward=*/false) <= 2 << 20);
      const MemoryReport backward = meter.measure([&] { step.backward(results); });
      CHECK(forward.held() + backward.added_peak() - step.floor_bytes(/*with_backward=*/true) <=
            (2 << 20) + sum_bytes(step));
    }
  }
}

TEST_CASE("what is saved between the passes is q, k, v, the output and the log-sum-exp") {
  for (const auto& [name, make] : attention_capabilities()) {
    INFO(name);
    const AttentionStep step = make({.batch = 2, .heads = 2, .length = 300, .head_dim = 16});
    std::vector<Tensor> results;
    const MemoryReport forward = MemoryMeter().measure([&] { results = step.forward(); });
    const int64_t bookkeeping = 64 * 8;  // lengths and starts of sequences, rows of the rotary table
    CHECK(forward.held() <= step.floor_bytes(/*with_backward=*/false) + bookkeeping);
  }
}

TEST_CASE("attention with polar positions is planned byte for byte, packed sequences and shared heads included") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  const bool packed = GENERATE(false, true);
  CAPTURE(type, packed);
  const Tensor starts = torch::tensor({0, 20, 300});
  const auto step = [=] {
    const auto make = [&](int64_t heads) { return torch::randn({2, heads, 300, 24}, type).requires_grad_(); };
    auto options = AttentionOptions().polar(nn::polar_table(300, 24));
    options.polar_phase(torch::zeros({2, 24}, type).requires_grad_());
    if (packed) options.sequence_starts(starts);
    attention(make(4), make(2), make(2), options).square().mean().backward();
  };
  const int64_t measured = MemoryMeter().measure(step).added_peak();
  CHECK(plan(step, this_machine(), {.value = 1}).peak_bytes == measured);
}
