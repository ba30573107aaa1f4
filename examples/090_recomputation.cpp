// One encoder under checkpoint policies: what each holds for backward, that gradients are the same, and which one a
// budget asks for.

#include <headroom/checkpoint.hpp>
#include <headroom/memory.hpp>
#include <headroom/nn.hpp>
#include <iostream>

using namespace headroom;

int main() {
  nn::EncoderOptions options(64, 4, {256}, 8);
  nn::Encoder encoder(options);
  const torch::Tensor x = torch::randn({4, 200, 64});  // [B,L,dim]

  const auto gradient = [&] {  // of the first weight
    encoder->zero_grad();
    encoder->forward(x).square().mean().backward();
    return encoder->parameters().front().grad().clone();
  };
  const torch::Tensor plain = gradient();

  // Peaks are planned: nothing runs
  const auto planned_peak = [&](const CheckpointPolicy& policy) {
    return plan(
               [&] {
                 nn::EncoderOptions candidate = options;
                 candidate.gradient_checkpointing(policy);
                 nn::Encoder copy(candidate);
                 copy->forward(torch::randn(x.sizes())).square().mean().backward();
               },
               this_machine())
        .peak_bytes;
  };

  for (const char* policy : {"none", "selective", "every-2", "full", "nested", "full+offload", "full+bf16"}) {
    encoder->options.gradient_checkpointing(policy);
    const bool equal = torch::equal(gradient(), plain);
    std::cout << policy << ": " << format_bytes(planned_peak(policy)) << ", gradients "
              << (equal ? "equal bit for bit" : "of rounded inputs") << '\n';
  }

  // From little to much recomputation: the first that fits
  const int64_t budget = 20 << 20;
  for (const char* policy : {"none", "selective", "full", "nested"}) {
    if (planned_peak(policy) > budget) continue;
    std::cout << "for " << format_bytes(budget) << ": " << policy << '\n';
    break;
  }
}
