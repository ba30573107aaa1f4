// torch::nn::MultiheadAttention and headroom's with the same weights: the same output, another amount of memory.

#include <torch/nn/modules/activation.h>
#include <torch/serialize.h>

#include <headroom/memory.hpp>
#include <headroom/nn/multihead_attention.hpp>
#include <iostream>
#include <sstream>

int main() {
  torch::nn::MultiheadAttention theirs(64, 4);
  headroom::nn::MultiheadAttention ours(64, 4);
  std::stringstream weights;
  torch::save(theirs, weights);
  torch::load(ours, weights);

  const torch::Tensor x = torch::randn({2048, 1, 64});                      // [length, batch, features]
  const torch::Tensor padding = torch::arange(2048).ge(2000).unsqueeze(0);  // [batch, length], true: no such key
  const headroom::MemoryMeter meter;
  const auto step = [&](auto& module, torch::Tensor& output) {
    return meter.measure([&] {
      output = std::get<0>(module->forward(x, x, x, padding, /*need_weights=*/false));
      output.sum().backward();
    });
  };
  torch::Tensor our_output, their_output;
  const auto our_step = step(ours, our_output), their_step = step(theirs, their_output);
  std::cout << "outputs are " << (our_output.allclose(their_output, 1e-4, 1e-5) ? "equal" : "different")
            << "; forward and backward took " << headroom::format_bytes(their_step.added_peak())
            << " with torch::nn and " << headroom::format_bytes(our_step.added_peak()) << " with headroom::nn\n";
}
