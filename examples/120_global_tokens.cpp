// A window with global tokens: each token sees its neighbours and the first 16 tokens, which see everything
// (Longformer; windowed attention with sink tokens in RoFormers). Time and memory grow with the length, not with its
// square.

#include <chrono>
#include <cstdio>
#include <headroom/attention.hpp>
#include <headroom/memory.hpp>

int main() {
  const auto options = headroom::AttentionOptions().window(headroom::AttentionWindow{128, 128}).global_keys(16);
  for (const int64_t length : {1024, 2048, 4096, 8192}) {
    const auto make = [&] { return torch::randn({1, 2, length, 32}).requires_grad_(); };
    const torch::Tensor q = make(), k = make(), v = make();
    const auto start = std::chrono::steady_clock::now();
    const headroom::MemoryMeter meter;
    const headroom::MemoryReport report = meter.measure([&] {
      const torch::Tensor output = headroom::attention(q, k, v, options);
      output.backward(torch::ones_like(output));
    });
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    std::printf("%5ld tokens: %.1f us and %s a token\n", length, time.count() / static_cast<double>(length),
                headroom::format_bytes(report.added_peak() / length).c_str());
  }

  // Who sees whom, of 12 tokens with a window of 1 and 2 global ones
  const torch::Tensor zeros = torch::zeros({1, 1, 12, 4}), unit = torch::eye(12).view({1, 1, 12, 12});
  const auto small = headroom::AttentionOptions().window(headroom::AttentionWindow{1, 1}).global_keys(2);
  const torch::Tensor seen = headroom::attention(zeros, zeros, unit, small)[0][0] > 0;
  for (int64_t query = 0; query < 12; ++query) {
    for (int64_t key = 0; key < 12; ++key) std::printf(seen[query][key].item<bool>() ? " #" : " .");
    std::printf("\n");
  }
}
