// Checkpoint policies on a GPU: time, peak as planned and as measured, and how much of offload's copies hides behind
// the computation.

#include <torch/torch.h>

#include "accelerator.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

struct Stack {
  int64_t layers = 12, batch = 16, length = 2049, dim = 256, heads = 8;
  std::vector<int64_t> hidden{1024};

  nn::Encoder make(const std::string& policy) const {
    nn::EncoderOptions options(dim, heads, hidden, layers);
    if (policy == "reversible") {
      options.reversible(true);
    } else {
      options.gradient_checkpointing(policy);
    }
    return nn::Encoder(options);
  }
  int64_t input_bytes() const { return batch * length * dim * 4; }
};

/// Seconds that copies of the blocks' inputs to pinned memory and back take on their own.
double copy_seconds(const benchmarks::Accelerator& gpu, const Stack& stack) {
  const Tensor there = torch::empty({stack.input_bytes() / 4}, torch::TensorOptions(gpu.device));
  const Tensor here = torch::empty({stack.input_bytes() / 4}, torch::TensorOptions().pinned_memory(true));
  Tensor back = torch::empty_like(there), host = here;
  const double once = gpu.shortest_of(5, [&] {
    host.copy_(there, /*non_blocking=*/true);
    back.copy_(host, /*non_blocking=*/true);
  });
  return once * static_cast<double>(stack.layers);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Checkpoint policies on a GPU", "gpu_policies");
  benchmarks::Report report;
  std::string device = "cuda";
  Stack stack;
  std::vector<std::string> policies{"none",         "selective",         "full",      "tiled",     "nested",
                                    "full+offload", "selective+offload", "full+bf16", "reversible"};
  app.add_option("--device", device, "The GPU")->capture_default_str();
  app.add_option("--policies", policies, "Policies")->capture_default_str();
  app.add_option("--batch", stack.batch, "Sequences")->capture_default_str();
  app.add_option("--layers", stack.layers, "Blocks")->capture_default_str();
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    report.json = {{"machine", gpu.describe()}, {"rows", nlohmann::json::array()}};
    DeviceProfile profile = device_profile("h100-80gb");
    profile.total_bytes = gpu.total_bytes();
    const double copies = copy_seconds(gpu, stack);
    report.json["copies_seconds"] = copies;
    std::printf("copies of all inputs, out and back: %.1f ms\n", copies * 1e3);
    std::printf("%-20s %10s %12s %12s %12s\n", "policy", "ms", "planned", "measured", "copies hidden");
    double full = 0, selective = 0;
    for (const std::string& policy : policies) {
      torch::manual_seed(0);
      nn::Encoder encoder = stack.make(policy);
      encoder->to(gpu.device);
      const Tensor x = torch::randn({stack.batch, stack.length, stack.dim}, torch::TensorOptions(gpu.device));
      const auto step = [&] {
        encoder->zero_grad();
        encoder->forward(x).square().mean().backward();
      };
      step();
      const double seconds = gpu.shortest_of(4, step);
      encoder->zero_grad();
      const int64_t measured = gpu.peak_of(step).allocated;
      const int64_t planned =
          plan(
              [&] {
                nn::Encoder dry = stack.make(policy);
                dry->forward(torch::randn({stack.batch, stack.length, stack.dim})).square().mean().backward();
              },
              profile)
              .peak_bytes;
      int64_t fixed = stack.input_bytes();  // planned with the step, there before it is measured
      for (const Tensor& p : encoder->parameters()) fixed += static_cast<int64_t>(p.nbytes());
      nlohmann::ordered_json row = {
          {"policy", policy}, {"seconds", seconds}, {"planned_bytes", planned - fixed}, {"measured_bytes", measured}};
      if (policy == "full") full = seconds;
      if (policy == "selective") selective = seconds;
      const double without = policy == "full+offload" ? full : policy == "selective+offload" ? selective : 0;
      std::printf("%-20s %10.1f %12s %12s", policy.c_str(), seconds * 1e3, format_bytes(planned - fixed).c_str(),
                  format_bytes(measured).c_str());
      if (without > 0) {
        row["copies_hidden"] = 1 - (seconds - without) / copies;
        std::printf(" %11.0f %%", 100 * row["copies_hidden"].get<double>());
      }
      std::printf("\n");
      std::fflush(stdout);
      report.json["rows"].push_back(row);
    }
  });
}
