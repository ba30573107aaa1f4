// Speed of attention: LibTorch's fused kernel, stored scores, chunks and tiles on the same inputs with the same
// threads.

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <chrono>
#include <limits>

#include "headroom/attention.hpp"
#include "report.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

double seconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Fused multiply-adds of independent registers on all threads: GF/s that no kernel can exceed.
double fma_peak() {
  namespace simd = core::simd;
  constexpr int kChains = 12;
  constexpr int64_t kRounds = 1 << 20;
  double best = std::numeric_limits<double>::infinity();
  for (int repeat = 0; repeat < 10; ++repeat) {
    best = std::min(best, seconds_of([] {
                      at::parallel_for(0, at::get_num_threads(), 1, [](int64_t first, int64_t last) {
                        for (int64_t thread = first; thread < last; ++thread) {
                          simd::Packet<float> x[kChains];
                          for (int i = 0; i < kChains; ++i) x[i] = simd::broadcast(static_cast<float>(i));
                          auto a = simd::broadcast(0.999F), b = simd::broadcast(0.001F);
                          simd::keep(a), simd::keep(b);
                          for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
                            for (int i = 0; i < kChains; ++i) x[i] = simd::pmadd(x[i], a, b);
                          }
                          for (int i = 1; i < kChains; ++i) x[0] = simd::padd(x[0], x[i]);
                          [[maybe_unused]] volatile float used = Eigen::internal::pfirst(x[0]);  // else all is dropped
                        }
                      });
                    }));
  }
  const double flops = 2.0 * kChains * kRounds * simd::kLanes<float> * at::get_num_threads();
  return flops / best / 1e9;
}

struct Shape {
  int64_t batch, heads, length;
};

/// Share of the scores that a variant leaves to be computed.
double computed_share(const std::string& variant, int64_t length) {
  const auto l = static_cast<double>(length);
  if (variant == "causal") return (l + 1) / (2 * l);
  if (variant == "window") return std::min(1.0, (2 * 128 + 1) / l);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Speed of attention beside LibTorch's fused CPU kernel", "attention_speed");
  benchmarks::Report report;
  std::vector<int64_t> dims{16, 24, 32, 64, 128};
  std::vector<std::string> shapes{"1x4x2049", "8x12x431", "1x1x8192", "32x12x2049"}, dtypes{"float", "bfloat16"},
      variants{"plain", "causal", "window", "bias"};
  double budget = 1, naive_gib = 2;
  app.add_option("--head-dim", dims, "Head dims")->capture_default_str();
  app.add_option("--shape", shapes, "Shapes as BxHxL")->capture_default_str();
  app.add_option("--dtype", dtypes, "float, bfloat16")
      ->check(CLI::IsMember({"float", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--variant", variants, "plain, causal, window (128 to each side), bias")
      ->check(CLI::IsMember({"plain", "causal", "window", "bias"}))
      ->capture_default_str();
  app.add_option("--seconds", budget, "Repeat each measurement at least 3 times and at least this long")
      ->capture_default_str();
  app.add_option("--naive-limit", naive_gib, "Leave stored scores out where they would need more GiB than this")
      ->capture_default_str();
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    if (report.threads > 0) torch::set_num_threads(report.threads);
    const double peak = fma_peak();
    std::printf("FMA peak of %d threads: %.0f GF/s\n", torch::get_num_threads(), peak);
    std::printf("%-9s %-17s %-9s %-7s %-11s %4s %10s %7s %8s %6s\n", "", "pass", "dtype", "variant", "BxHxL", "D", "ms",
                "GF/s", "x torch", "% peak");
    report.json = {
        {"machine",
         {{"cpu", benchmarks::processor()}, {"threads", torch::get_num_threads()}, {"fma_peak_gflops", peak}}},
        {"rows", nlohmann::json::array()}};
    for (const std::string& text : shapes) {
      Shape shape{};
      require(std::sscanf(text.c_str(), "%ldx%ldx%ld", &shape.batch, &shape.heads, &shape.length) == 3 &&
                  shape.batch > 0 && shape.heads > 0 && shape.length > 0,
              "headroom.benchmarks.shape", "shape is ", text, ", expected BxHxL, as 1x4x2049");
      for (const std::string& dtype : dtypes) {
        const auto type = dtype == "float" ? torch::kFloat : torch::kBFloat16;
        for (const int64_t dim : dims) {
          for (const std::string& variant : variants) {
            const auto make = [&](bool grad) {
              return torch::randn({shape.batch, shape.heads, shape.length, dim}).to(type).requires_grad_(grad);
            };
            const Tensor q = make(true), k = make(true), v = make(true), grad = make(false);
            const Tensor bias = variant == "bias" ? torch::randn({shape.length, shape.length}).to(type) : Tensor();
            const Tensor band =
                variant == "window"
                    ? torch::ones({shape.length, shape.length}, torch::kBool)
                          .tril(128)
                          .logical_and(torch::ones({shape.length, shape.length}, torch::kBool).triu(-128))
                    : Tensor();
            AttentionOptions options;
            options.causal(variant == "causal");
            if (variant == "window") options.window(AttentionWindow{128, 128});
            if (bias.defined()) options.bias(bias);
            const auto torch_attention = [&] {
              const auto mask = bias.defined()   ? std::optional(bias)
                                : band.defined() ? std::optional(band)
                                                 : std::nullopt;
              return torch::scaled_dot_product_attention(q, k, v, mask, 0.0, variant == "causal");
            };
            const double scores = 4.0 * static_cast<double>(shape.batch * shape.heads) * shape.length * shape.length;
            for (const std::string pass : {"forward", "forward_backward"}) {
              const bool backward = pass == "forward_backward";
              struct Contender {
                std::string name;
                std::function<Tensor()> run;
                double best = std::numeric_limits<double>::infinity();
              };
              std::vector<Contender> contenders{{"torch", torch_attention}};
              for (const auto backend :
                   {AttentionBackend::reference, AttentionBackend::chunked, AttentionBackend::tiled}) {
                if (backend == AttentionBackend::reference && 3 * scores > naive_gib * (1 << 30)) continue;
                std::ostringstream name;
                name << backend;
                contenders.push_back({backend == AttentionBackend::reference ? "naive" : name.str(), [&, backend] {
                                        return attention(q, k, v, AttentionOptions(options).backend(backend));
                                      }});
              }
              // in turns, so that whatever disturbs the machine disturbs all of them
              double spent = 0;
              for (int repeat = 0; repeat < 3 || spent < budget * static_cast<double>(contenders.size()); ++repeat) {
                for (Contender& c : contenders) {
                  const torch::AutoGradMode mode(backward);
                  const double seconds = seconds_of([&] {
                    const Tensor output = c.run();
                    if (backward) output.backward(grad);
                  });
                  if (repeat > 0) c.best = std::min(c.best, seconds);
                  spent += seconds;
                  for (const Tensor& x : {q, k, v}) x.mutable_grad() = Tensor();
                }
              }
              const double flops =
                  scores * static_cast<double>(dim) * (backward ? 3.5 : 1.0) * computed_share(variant, shape.length);
              for (const Contender& c : contenders) {
                const double gflops = flops / c.best / 1e9, ratio = contenders[0].best / c.best;
                std::printf("%-9s %-17s %-9s %-7s %-11s %4ld %10.2f %7.0f %8.2f %6.0f\n", c.name.c_str(), pass.c_str(),
                            dtype.c_str(), variant.c_str(), text.c_str(), dim, c.best * 1e3, gflops, ratio,
                            100 * gflops / peak);
                std::fflush(stdout);
                report.json["rows"].push_back({{"implementation", c.name},
                                               {"pass", pass},
                                               {"dtype", dtype},
                                               {"variant", variant},
                                               {"batch", shape.batch},
                                               {"heads", shape.heads},
                                               {"length", shape.length},
                                               {"head_dim", dim},
                                               {"milliseconds", c.best * 1e3},
                                               {"gflops", gflops},
                                               {"ratio_to_torch", ratio},
                                               {"fraction_of_peak", gflops / peak}});
              }
            }
          }
        }
      }
    }
  });
}
