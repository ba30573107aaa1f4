// Attention on a GPU beside LibTorch's scaled_dot_product_attention: time, and memory beside the floor.

#include <torch/torch.h>

#include <functional>

#include "accelerator.hpp"
#include "attention_capabilities.hpp"
#include "headroom/attention.hpp"

using namespace headroom;
using torch::Tensor;

int main(int argc, char** argv) {
  CLI::App app("Time and memory of attention on a GPU", "gpu_attention");
  benchmarks::Report report;
  std::string device = "cuda";
  std::vector<int64_t> lengths{512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072};
  int64_t dim = 64, tokens = 65536, heads = 8;
  app.add_option("--device", device, "The GPU")->capture_default_str();
  app.add_option("--lengths", lengths, "Lengths")->capture_default_str();
  app.add_option("--head-dim", dim, "Head dim")->capture_default_str();
  app.add_option("--tokens", tokens, "Batch x length, where one sequence is shorter")->capture_default_str();
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    report.json = {{"machine", gpu.describe()}, {"rows", nlohmann::json::array()}};
    std::printf("%-9s %-8s %7s %6s %12s %12s %8s %8s %12s %12s\n", "dtype", "", "length", "BxH", "forward ms",
                "both ms", "x torch", "x torch", "peak", "floor");
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      for (const int64_t length : lengths) {
        const int64_t batch = std::max<int64_t>(tokens / length, 1);
        const int64_t used_heads = length > 32768 ? 2 : heads;  // minutes otherwise
        // in memory as a model's projections give them: [B,L,H,D]
        const auto make = [&](bool grad) {
          const Tensor x = torch::randn({batch, length, used_heads, dim}, torch::TensorOptions(gpu.device)).to(dtype);
          return x.transpose(1, 2).requires_grad_(grad);
        };
        benchmarks::AttentionStep step{make(true), make(true), make(true)};
        step.grad_output = make(false);
        struct Contender {
          const char* name;
          std::function<Tensor()> run;
          double forward = std::numeric_limits<double>::infinity(), both = forward;
          int64_t peak = 0;
        };
        const auto ours = [&](AttentionBackend backend) {
          return [&, backend] { return attention(step.q, step.k, step.v, AttentionOptions().backend(backend)); };
        };
        std::vector<Contender> contenders{
            {"torch", [&] { return torch::scaled_dot_product_attention(step.q, step.k, step.v); }},
            {"fused", ours(AttentionBackend::fused)}};
        if (length <= 32768) contenders.push_back({"chunked", ours(AttentionBackend::chunked)});
        const auto forward = [&](Contender& c) {
          const torch::NoGradGuard guard;
          c.run();
        };
        const auto both = [&](Contender& c) {
          torch::autograd::grad({c.run()}, {step.q, step.k, step.v}, {step.grad_output});
        };
        // in turns, until every one has had its share
        double spent = 0;
        for (int repeat = 0; repeat < 3 || (spent < 0.6 && repeat < 20); ++repeat) {
          for (Contender& c : contenders) {
            const double f = gpu.seconds_of([&] { forward(c); }), b = gpu.seconds_of([&] { both(c); });
            if (repeat > 0) c.forward = std::min(c.forward, f), c.both = std::min(c.both, b);
            spent += f + b;
          }
          if (spent > 12 && repeat > 0) break;
        }
        for (Contender& c : contenders) {
          c.peak = gpu.peak_of([&] { both(c); }).allocated;
          const double forward_ratio = c.forward / contenders[0].forward, both_ratio = c.both / contenders[0].both;
          const int64_t floor = step.floor_bytes(true);
          std::printf("%-9s %-8s %7ld %6ld %12.3f %12.3f %8.3f %8.3f %12s %12s\n",
                      dtype == torch::kFloat ? "float" : "bfloat16", c.name, length, batch * used_heads,
                      c.forward * 1e3, c.both * 1e3, forward_ratio, both_ratio, format_bytes(c.peak).c_str(),
                      format_bytes(floor).c_str());
          std::fflush(stdout);
          report.json["rows"].push_back({{"dtype", dtype == torch::kFloat ? "float" : "bfloat16"},
                                         {"implementation", c.name},
                                         {"length", length},
                                         {"batch", batch},
                                         {"heads", used_heads},
                                         {"head_dim", dim},
                                         {"forward_seconds", c.forward},
                                         {"forward_backward_seconds", c.both},
                                         {"forward_to_torch", forward_ratio},
                                         {"forward_backward_to_torch", both_ratio},
                                         {"peak_bytes", c.peak},
                                         {"floor_bytes", floor}});
        }
      }
    }
  });
}
