// Peak memory of attention against sequence length: stored scores (naive) and tiles.

#include <torch/torch.h>

#include "headroom/attention.hpp"
#include "headroom/memory.hpp"
#include "report.hpp"

using namespace headroom;
using torch::Tensor;

int main(int argc, char** argv) {
  CLI::App app("Peak bytes of attention by length, forward and forward+backward, beside the floor", "attention_memory");
  benchmarks::Report report;
  int64_t max_length = 8192, heads = 4, head_dim = 32;
  double naive_gib = 6;
  app.add_option("--max-length", max_length, "Longest sequence; lengths double from 256")
      ->check(CLI::Range(256, 1 << 20))
      ->capture_default_str();
  app.add_option("--heads", heads, "Heads")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--head-dim", head_dim, "Head dim")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--naive-limit", naive_gib, "Leave naive attention out where it would need more GiB than this")
      ->capture_default_str();
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    if (report.threads > 0) torch::set_num_threads(report.threads);
    torch::manual_seed(0);
    report.json = {{"heads", heads}, {"head_dim", head_dim}, {"rows", nlohmann::json::array()}};
    std::printf("%-10s %-17s %8s %14s %14s %8s\n", "", "pass", "length", "peak", "floor", "ratio");
    for (const auto& [name, backend] :
         {std::pair{"naive", AttentionBackend::reference}, {"tiled", AttentionBackend::tiled}}) {
      for (const bool with_backward : {false, true}) {
        for (int64_t length = 256; length <= max_length; length *= 2) {
          const int64_t tensor = heads * length * head_dim * 4, row = heads * length * 4;
          // forward: q,k,v,o + LSE; with backward: + do,dq,dk,dv + delta
          const int64_t floor = with_backward ? 8 * tensor + 2 * row : 4 * tensor + row;
          const double scores = static_cast<double>(heads * length * length * 4);
          if (backend == AttentionBackend::reference && 4 * scores > naive_gib * (1 << 30)) continue;
          MemoryMeter meter;
          const MemoryReport memory = meter.measure([&] {
            const auto make = [&] { return torch::randn({1, heads, length, head_dim}).requires_grad_(with_backward); };
            const Tensor q = make(), k = make(), v = make();
            const Tensor output = attention(q, k, v, AttentionOptions().backend(backend));
            if (with_backward) output.backward(torch::ones_like(output));
          });
          const char* const pass = with_backward ? "forward_backward" : "forward";
          std::printf("%-10s %-17s %8ld %14s %14s %8.2f\n", name, pass, length,
                      format_bytes(memory.added_peak()).c_str(), format_bytes(floor).c_str(),
                      static_cast<double>(memory.added_peak()) / static_cast<double>(floor));
          report.json["rows"].push_back({{"implementation", name},
                                         {"pass", pass},
                                         {"length", length},
                                         {"peak_bytes", memory.added_peak()},
                                         {"floor_bytes", floor}});
        }
      }
    }
  });
}
