// One layer of the guide's first memory_optimized configuration, whose frequency attention once asked for 80.89 GiB:
// 431 frames x 12 heads x 2049 bins x head dim 16, forward and backward on this machine.

#include <torch/torch.h>

#include <cstdio>

#include "benchmark.hpp"
#include "headroom/attention/attention.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/resident.hpp"
#include "timing.hpp"

using namespace headroom;
using torch::Tensor;

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("guide_layer", "The guide's frequency-axis attention, forward and backward");
  int64_t frames = 431;
  const int64_t heads = 12, bins = 2049, head_dim = 16;
  benchmark.add({.name = "--frames", .help = "Frames in the batch", .target = &frames, .least = 1});
  return benchmark.run(argc, argv, [&] {
    torch::manual_seed(0);
    const int64_t rows = frames * heads * bins;
    const int64_t floor = 8 * rows * head_dim * 4 + 2 * rows * 4;  // q,k,v,o,do,dq,dk,dv + LSE + delta
    const int64_t stored_scores = rows * bins * 4;
    const int64_t resident_start = resident_bytes();

    MemoryMeter meter;
    double forward = 0, backward = 0;
    const MemoryReport memory = meter.measure([&] {
      const auto make = [&] { return torch::randn({frames, heads, bins, head_dim}); };
      const Tensor q = make().requires_grad_(), k = make().requires_grad_(), v = make().requires_grad_(), grad = make();
      Tensor output;
      forward = benchmarks::seconds_of([&] { output = attention(q, k, v); });
      backward = benchmarks::seconds_of([&] { output.backward(grad); });
    });
    const double gflop = 4.0 * static_cast<double>(rows) * static_cast<double>(bins * head_dim) * 1e-9;

    for (const auto& [name, value] : benchmarks::Row{{"peak_bytes", memory.added_peak()},
                                                     {"largest_allocation_bytes", *memory.largest},
                                                     {"resident_start_bytes", resident_start},
                                                     {"resident_peak_bytes", peak_resident_bytes()},
                                                     {"floor_bytes", floor},
                                                     {"stored_scores_bytes", stored_scores},
                                                     {"forward_seconds", forward},
                                                     {"backward_seconds", backward},
                                                     {"threads", torch::get_num_threads()},
                                                     {"shape", std::vector{frames, heads, bins, head_dim}}}) {
      benchmark.note(name, value);
    }
    std::printf("attention over q,k,v [%ld,%ld,%ld,%ld], float, %d threads\n", frames, heads, bins, head_dim,
                torch::get_num_threads());
    std::printf("  scores, if stored            %12s  in one tensor\n", format_bytes(stored_scores).c_str());
    std::printf("  floor                        %12s  q,k,v,o,do,dq,dk,dv + LSE + delta\n",
                format_bytes(floor).c_str());
    std::printf("  peak                         %12s  %.3f x the floor\n", format_bytes(memory.added_peak()).c_str(),
                static_cast<double>(memory.added_peak()) / static_cast<double>(floor));
    std::printf("  largest allocation           %12s\n", format_bytes(*memory.largest).c_str());
    std::printf("  resident size at start, peak %12s  %s\n", format_bytes(resident_start).c_str(),
                format_bytes(peak_resident_bytes()).c_str());
    std::printf("  forward                      %10.2f s  %.0f GFLOP/s\n", forward, gflop / forward);
    std::printf("  backward                     %10.2f s  %.0f GFLOP/s\n", backward, 2.5 * gflop / backward);
  });
}
