// Rotary embedding and grouped queries straight from one projection: q, k and v are views of it, heads of k and v are
// shared, rotation happens as the kernel reads. No copy is made on the way in or out.

#include <headroom/attention.hpp>
#include <headroom/memory.hpp>
#include <headroom/nn/rotary.hpp>
#include <iostream>

using torch::Tensor;

int main() {
  torch::manual_seed(0);
  const int64_t length = 4096, heads = 8, kv_heads = 2, dim = 32;
  torch::NoGradGuard no_grad;
  const Tensor projected = torch::randn({1, length, heads + 2 * kv_heads, dim});  // as a linear layer makes it
  const Tensor table = headroom::nn::rotary_table(length, dim);                   // complex [L, D/2]

  const auto part = [&](int64_t first, int64_t count) { return projected.narrow(2, first, count).transpose(1, 2); };
  const Tensor q = part(0, heads), k = part(heads, kv_heads), v = part(heads + kv_heads, kv_heads);  // [1, heads, L, D]

  Tensor rows;
  const headroom::MemoryMeter meter;
  const auto memory = meter.measure([&] {
    const Tensor output = headroom::attention(q, k, v, headroom::AttentionOptions().rotary(table).causal(true));
    rows = output.transpose(1, 2).flatten(2);  // [1, L, heads·D], for the next linear layer: the output lies so already
  });

  // the same with rotated copies and repeated heads
  const auto repeated = [&](const Tensor& x) { return x.repeat_interleave(heads / kv_heads, 1); };
  const Tensor expected =
      torch::scaled_dot_product_attention(headroom::nn::rotate(q, table), repeated(headroom::nn::rotate(k, table)),
                                          repeated(v), {}, 0.0, /*is_causal=*/true);
  const double difference = (rows - expected.transpose(1, 2).flatten(2)).abs().max().item<double>();
  std::cout << "differs from rotated copies by " << (difference < 1e-5 ? "nothing but rounding" : "too much")
            << "; the output is " << headroom::format_bytes(static_cast<int64_t>(rows.nbytes()))
            << ", all that was allocated " << headroom::format_bytes(memory.added_peak()) << '\n';
}
