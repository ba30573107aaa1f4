// One encoder under checkpoint policies: what each holds for backward, that gradients are the same, and which one a
// budget asks for, block by block.

#include <headroom/checkpoint.hpp>
#include <headroom/nn.hpp>
#include <headroom/plan.hpp>
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

  // A step under a policy, to be planned: nothing runs
  const auto step = [&](const StackPolicy& policy) {
    nn::EncoderOptions candidate = options;
    candidate.gradient_checkpointing(policy);
    nn::Encoder copy(candidate);
    copy->forward(torch::randn(x.sizes())).square().mean().backward();
  };

  for (const char* policy : {"none", "selective", "every-2", "full", "4*full,none", "nested", "full+bf16"}) {
    encoder->options.gradient_checkpointing(policy);
    const int64_t peak = plan([&] { step(policy); }, this_machine()).peak_bytes;
    const bool equal = torch::equal(gradient(), plain);
    std::cout << policy << ": " << format_bytes(peak) << ", gradients "
              << (equal ? "equal bit for bit" : "of rounded inputs") << '\n';
  }

  // The least recomputation that fits
  for (const int64_t mebibytes : {24, 16, 8}) {
    const auto choice = fit_policy(step, options.layers(), this_machine(), {.budget = mebibytes << 20});
    std::cout << "for " << mebibytes << " MiB: "
              << (choice ? choice->policy.text() + ", " + format_bytes(choice->plan.peak_bytes) : "nothing fits")
              << '\n';
  }
}
