// Attention on a GPU beside LibTorch's scaled_dot_product_attention: time, and memory beside the floor.

#include <torch/torch.h>

#include <cstdio>

#include "accelerator.hpp"
#include "attention_step.hpp"
#include "headroom/memory/format.hpp"
#include "timing.hpp"

using namespace headroom;
using benchmarks::AttentionStep;
using torch::Tensor;

namespace {

/// Who computes attention of a step, and how it did.
struct Implementation {
  const char* name;
  std::function<Tensor()> forward;
  double forward_seconds = 0, both_seconds = 0;
  int64_t peak = 0;
};

std::vector<Implementation> implementations(const AttentionStep& step) {
  const auto ours = [&](AttentionBackend backend) {
    return [&step, backend] { return attention(step.q, step.k, step.v, AttentionOptions().backend(backend)); };
  };
  std::vector<Implementation> all{
      {"torch", [&step] { return torch::scaled_dot_product_attention(step.q, step.k, step.v); }},
      {"fused", ours(AttentionBackend::fused)}};
  if (step.q.size(2) <= 32768) all.push_back({"chunked", ours(AttentionBackend::chunked)});
  return all;
}

void measure(const benchmarks::Accelerator& gpu, const AttentionStep& step, std::vector<Implementation>& all) {
  const auto both = [&](const Implementation& one) {
    torch::autograd::grad({one.forward()}, {step.q, step.k, step.v}, {step.grad_output});
  };
  std::vector<benchmarks::Contender> forward, whole;
  for (const Implementation& one : all) {
    forward.push_back({one.name, [&] {
                         const torch::NoGradGuard guard;
                         return gpu.seconds_of([&] { one.forward(); });
                       }});
    whole.push_back({one.name, [&] { return gpu.seconds_of([&] { both(one); }); }});
  }
  const benchmarks::Rounds rounds{.least = 1, .seconds = 0.2, .most = 20};
  benchmarks::race(forward, rounds);
  benchmarks::race(whole, rounds);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].forward_seconds = forward[i].best, all[i].both_seconds = whole[i].best;
    all[i].peak = gpu.peak_of([&] { both(all[i]); }).allocated;
  }
}

void report(benchmarks::Benchmark& benchmark, const AttentionStep& step, const std::vector<Implementation>& all) {
  const char* const dtype = step.q.scalar_type() == torch::kFloat ? "float" : "bfloat16";
  const int64_t batch = step.q.size(0), heads = step.q.size(1), length = step.q.size(2);
  for (const Implementation& one : all) {
    const double forward_ratio = one.forward_seconds / all[0].forward_seconds;
    const double both_ratio = one.both_seconds / all[0].both_seconds;
    const int64_t floor = step.floor_bytes(true);
    std::printf("%-9s %-8s %7ld %6ld %12.3f %12.3f %8.3f %8.3f %12s %12s\n", dtype, one.name, length, batch * heads,
                one.forward_seconds * 1e3, one.both_seconds * 1e3, forward_ratio, both_ratio,
                format_bytes(one.peak).c_str(), format_bytes(floor).c_str());
    std::fflush(stdout);
    benchmark.add_row({{"dtype", dtype},
                       {"implementation", one.name},
                       {"length", length},
                       {"batch", batch},
                       {"heads", heads},
                       {"head_dim", step.q.size(3)},
                       {"forward_seconds", one.forward_seconds},
                       {"forward_backward_seconds", one.both_seconds},
                       {"forward_to_torch", forward_ratio},
                       {"forward_backward_to_torch", both_ratio},
                       {"peak_bytes", one.peak},
                       {"floor_bytes", floor}});
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("gpu_attention", "Time and memory of attention on a GPU");
  std::string device = "cuda";
  std::vector<int64_t> lengths{512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072};
  int64_t dim = 64, tokens = 65536;
  benchmark.add({.name = "--device", .help = "The GPU", .target = &device});
  benchmark.add({.name = "--lengths", .help = "Lengths", .target = &lengths, .least = 1});
  benchmark.add({.name = "--head-dim", .help = "Head dim", .target = &dim, .least = 1});
  benchmark.add({.name = "--tokens", .help = "Batch x length, where one sequence is shorter", .target = &tokens});
  return benchmark.run(argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    benchmark.note("machine", gpu.describe());
    std::printf("%-9s %-8s %7s %6s %12s %12s %8s %8s %12s %12s\n", "dtype", "", "length", "BxH", "forward ms",
                "both ms", "x torch", "x torch", "peak", "floor");
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      for (const int64_t length : lengths) {
        // in memory as a model's projections give them: [B,L,H,D]
        const auto make = [&](bool grad) {
          const int64_t batch = std::max<int64_t>(tokens / length, 1), heads = length > 32768 ? 2 : 8;  // else minutes
          const Tensor x = torch::randn({batch, length, heads, dim}, torch::TensorOptions(gpu.device)).to(dtype);
          return x.transpose(1, 2).requires_grad_(grad);
        };
        AttentionStep step{make(true), make(true), make(true)};
        step.grad_output = make(false);
        std::vector<Implementation> all = implementations(step);
        measure(gpu, step, all);
        report(benchmark, step, all);
      }
    }
  });
}
