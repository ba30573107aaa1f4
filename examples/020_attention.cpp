// Attention on LibTorch tensors, and what it needs, measured.

#include <headroom/attention.hpp>
#include <headroom/memory.hpp>
#include <iostream>

int main() {
  const auto make = [] { return torch::randn({1, 4, 8192, 32}).requires_grad_(); };  // [batch, heads, length, head dim]
  const torch::Tensor q = make(), k = make(), v = make();

  const headroom::MemoryMeter meter;
  const headroom::MemoryReport report = meter.measure([&] {
    const auto output = headroom::attention(q, k, v, headroom::AttentionOptions().causal(true));
    output.backward(torch::ones_like(output));
  });

  std::cout << "stored scores would take " << headroom::format_bytes(int64_t{4} * 8192 * 8192 * 4)
            << ", forward and backward took " << headroom::format_bytes(report.added_peak()) << '\n';
}
