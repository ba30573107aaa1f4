// Checkpoint policies on a GPU: time, peak as planned and as measured, and how much of offload's copies hides behind
// the computation.

#include <torch/torch.h>

#include <cstdio>
#include <map>

#include "headroom/memory/format.hpp"
#include "steps.hpp"
#include "timing.hpp"

using namespace headroom;
using benchmarks::EncoderSizes;
using torch::Tensor;

namespace {

int64_t input_bytes(const EncoderSizes& sizes) { return sizes.batch * sizes.length * sizes.dim * 4; }

/// Seconds that copies of the blocks' inputs to pinned memory and back take on their own.
double copy_seconds(const benchmarks::Accelerator& gpu, const EncoderSizes& sizes) {
  const int64_t elements = input_bytes(sizes) / 4;
  const Tensor there = torch::empty({elements}, torch::TensorOptions(gpu.device));
  Tensor host = torch::empty({elements}, torch::TensorOptions().pinned_memory(true)), back = torch::empty_like(there);
  const auto copy = [&] {
    host.copy_(there, /*non_blocking=*/true);
    back.copy_(host, /*non_blocking=*/true);
  };
  return benchmarks::shortest_of([&] { return gpu.seconds_of(copy); }, {.warm_up = false, .least = 5}) *
         static_cast<double>(sizes.layers);
}

struct Measurement {
  double seconds = 0;
  int64_t planned_bytes = 0, measured_bytes = 0;
};

Measurement measure(const benchmarks::Accelerator& gpu, const EncoderSizes& sizes, const std::string& policy) {
  torch::manual_seed(0);
  const auto [encoder, x, run] = benchmarks::make_encoder_step(sizes, policy, gpu.device);
  const auto step = [encoder = encoder, run = run] {
    encoder->zero_grad();
    run();
  };
  Measurement result;
  result.seconds = benchmarks::shortest_of([&] { return gpu.seconds_of(step); }, {.least = 4});
  encoder->zero_grad();
  result.measured_bytes = gpu.peak_of(step).allocated;
  int64_t fixed = input_bytes(sizes);  // planned with the step, there before it is measured
  for (const Tensor& p : encoder->parameters()) fixed += static_cast<int64_t>(p.nbytes());
  result.planned_bytes =
      benchmarks::planned_on_gpu([&] { benchmarks::make_encoder_step(sizes, policy).run(); }, gpu.total_bytes())
          .peak_bytes -
      fixed;
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("gpu_policies", "Checkpoint policies on a GPU");
  std::string device = "cuda";
  EncoderSizes sizes{.layers = 12, .batch = 16, .length = 2049, .dim = 256, .heads = 8, .hidden = {1024}};
  std::vector<std::string> policies{"none",         "selective",         "full",      "tiled",     "nested",
                                    "full+offload", "selective+offload", "full+bf16", "reversible"};
  benchmark.add({.name = "--device", .help = "The GPU", .target = &device});
  benchmark.add({.name = "--policies", .help = "Policies", .target = &policies});
  benchmark.add({.name = "--batch", .help = "Sequences", .target = &sizes.batch, .least = 1});
  benchmark.add({.name = "--layers", .help = "Blocks", .target = &sizes.layers, .least = 1});
  return benchmark.run(argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    benchmark.note("machine", gpu.describe());
    const double copies = copy_seconds(gpu, sizes);
    benchmark.note("copies_seconds", copies);
    std::printf("copies of all inputs, out and back: %.1f ms\n", copies * 1e3);
    std::printf("%-20s %10s %12s %12s %12s\n", "policy", "ms", "planned", "measured", "copies hidden");
    std::map<std::string, double> seconds;
    for (const std::string& policy : policies) {
      const Measurement now = measure(gpu, sizes, policy);
      seconds[policy] = now.seconds;
      benchmarks::Row row = {{"policy", policy},
                             {"seconds", now.seconds},
                             {"planned_bytes", now.planned_bytes},
                             {"measured_bytes", now.measured_bytes}};
      std::printf("%-20s %10.1f %12s %12s", policy.c_str(), now.seconds * 1e3, format_bytes(now.planned_bytes).c_str(),
                  format_bytes(now.measured_bytes).c_str());
      const auto without = seconds.find(policy.substr(0, policy.find("+offload")));
      if (policy.ends_with("+offload") && without != seconds.end()) {
        const double hidden = 1 - (now.seconds - without->second) / copies;
        row.emplace_back("copies_hidden", hidden);
        std::printf(" %11.0f %%", 100 * hidden);
      }
      std::printf("\n");
      std::fflush(stdout);
      benchmark.add_row(row);
    }
  });
}
