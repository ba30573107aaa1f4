// What a training step will need on a card that is not here, found without running it.

#include <headroom/nn.hpp>
#include <headroom/plan.hpp>
#include <iostream>

int main() {
  const headroom::Plan plan = headroom::plan(
      [] {
        headroom::nn::Encoder encoder(headroom::nn::EncoderOptions(512, 8, {2048}, 12));
        headroom::name_modules(*encoder, "encoder");
        torch::optim::AdamW optimizer(encoder->parameters());
        for (int step = 0; step < 2; ++step) {  // the optimizer's state comes with the first step
          optimizer.zero_grad();
          encoder->forward(torch::randn({8, 16384, 512})).square().mean().backward();
          const headroom::Phase phase("optimizer");
          optimizer.step();
        }
      },
      headroom::device_profile("rtx-4090-24gb"));

  headroom::print_plan(std::cout, plan);
  std::cout << headroom::explain(plan);
}
