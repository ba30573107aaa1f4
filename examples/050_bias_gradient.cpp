// A relative position bias, learned: b[h, distance] is added to every score of that distance. Its gradient sums the
// gradients of scores along diagonals inside the kernel, so that both are O(L) where a bias [H, L, L] would be O(L²).

#include <headroom/attention.hpp>
#include <headroom/memory.hpp>
#include <iostream>

int main() {
  torch::manual_seed(0);
  const int64_t heads = 2, length = 512, reach = length;
  const auto noise = [&] { return torch::randn({1, heads, length, 8}); };
  const torch::Tensor q = noise(), k = noise(), v = noise();

  // What is to be found: one head looks around itself, the other one 20 positions back
  const torch::Tensor distance = torch::arange(1 - reach, reach, torch::kFloat);  // of query and key, [2R-1]
  const torch::Tensor wanted = torch::stack({-distance.abs() / 4, -(distance - 20).abs() / 4});  // [H, 2R-1]
  const torch::Tensor target = headroom::attention(q, k, v, headroom::AttentionOptions().relative_bias(wanted));

  torch::Tensor bias = torch::zeros({heads, 2 * reach - 1}).requires_grad_();
  torch::optim::Adam optimizer({bias}, torch::optim::AdamOptions(0.2));
  double first = 0, last = 0;
  const headroom::MemoryMeter meter;
  const headroom::MemoryReport memory = meter.measure([&] {
    for (int step = 0; step < 100; ++step) {
      optimizer.zero_grad();
      const auto output = headroom::attention(q, k, v, headroom::AttentionOptions().relative_bias(bias));
      const torch::Tensor loss = torch::mse_loss(output, target);
      loss.backward();
      optimizer.step();
      last = loss.item<double>();
      if (step == 0) first = last;
    }
  });

  const torch::Tensor peaks = bias.detach().argmax(1) - (reach - 1);
  std::cout << "loss fell from " << first << " to " << last << (last < first / 100 ? ", found" : ", did not find")
            << " heads that look " << peaks[0].item<int64_t>() << " and " << peaks[1].item<int64_t>()
            << " positions back\n"
            << "a bias [H, L, L] and its gradient would take "
            << headroom::format_bytes(2 * heads * length * length * 4) << ", the largest tensor here took "
            << headroom::format_bytes(*memory.largest) << '\n';
}
