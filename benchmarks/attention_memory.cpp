// What attention needs beside the floor: for every option, and by length beside stored scores and LibTorch's own.

#include <malloc.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>

#include "attention_capabilities.hpp"
#include "benchmark.hpp"
#include "headroom/memory/meter.hpp"
#include "resident_growth.hpp"

using namespace headroom;
using namespace headroom::benchmarks;

namespace {

/// What a step adds at its highest point. The resident size also sees what no allocator counts: stacks, libraries'
/// workspaces, what malloc keeps.
struct Peak {
  int64_t counted, largest, resident;
};

/// Runs `step` twice: once counted by the allocator, which also brings code and stacks into memory, then watched by the
/// kernel. The kernel counts a CPU's pages in batches, so resident sizes are right to some hundred KiB.
Peak peak_of(const std::function<void()>& step) {
  Peak peak{};
  {
    const MemoryMeter meter;
    const MemoryReport report = meter.measure(step);
    peak.counted = report.added_peak(), peak.largest = *report.largest;
  }
  peak.resident = benchmarks::resident_growth(step);
  return peak;
}

/// What is measured, by whom.
struct Subject {
  std::string implementation, variant;
  AttentionSizes sizes;
};

/// Prints and keeps a row for each pass of a step whose output comes from `forward`.
void measure(Benchmark& benchmark, const Subject& subject, const AttentionStep& step,
             const std::function<std::vector<Tensor>()>& forward) {
  const auto& [implementation, variant, sizes] = subject;
  for (const bool with_backward : {false, true}) {
    const Peak peak = peak_of([&] {
      const torch::AutoGradMode mode(with_backward);
      const auto results = forward();
      if (with_backward) step.backward(results);
    });
    const int64_t threads = torch::get_num_threads(), floor = step.floor_bytes(with_backward);
    const int64_t inputs = step.input_bytes(with_backward);
    const int64_t extra = peak.counted - floor, resident_extra = peak.resident - floor;
    // 1 MiB a thread; the backward pass of fewer heads than threads may add an accumulator [Lq, D] a thread
    const int64_t rows = step.q.size(-2), dim = step.q.size(-1);
    const bool few_heads = step.q.numel() / (rows * dim) < threads;
    const int64_t bar = (1 << 20) + (with_backward && few_heads ? rows * dim * 4 : 0);
    const char* const pass = with_backward ? "forward_backward" : "forward";
    std::printf("%-8s %-30s %-17s %7ld %12s %12s %12s %12s %s\n", implementation.c_str(), variant.c_str(), pass,
                sizes.length, format_bytes(inputs + peak.counted).c_str(), format_bytes(inputs + floor).c_str(),
                format_bytes(extra / threads).c_str(), format_bytes(resident_extra / threads).c_str(),
                std::max(extra, resident_extra) > bar * threads ? "above the bar" : "");
    std::fflush(stdout);
    benchmark.add_row({{"implementation", implementation},
                       {"variant", variant},
                       {"pass", pass},
                       {"batch", sizes.batch},
                       {"heads", sizes.heads},
                       {"length", sizes.length},
                       {"head_dim", sizes.head_dim},
                       {"peak_bytes", inputs + peak.counted},
                       {"floor_bytes", inputs + floor},
                       {"largest_bytes", peak.largest},
                       {"extra_bytes", extra},
                       {"extra_bytes_per_thread", extra / threads},
                       {"resident_extra_bytes", resident_extra},
                       {"resident_extra_bytes_per_thread", resident_extra / threads},
                       {"bar_bytes_per_thread", bar}});
  }
}

/// The plain request, and LibTorch's with dropout, which stores scores without a word.
void measure_growth(Benchmark& benchmark, const std::string& implementation, const AttentionSizes& sizes) {
  const AttentionStep step = attention_capabilities().front().make(sizes);
  if (implementation == "torch" || implementation == "torch dropout") {
    const double dropout = implementation == "torch" ? 0.0 : 0.1;
    measure(benchmark, {"torch", dropout > 0 ? "dropout" : "plain", sizes}, step, [&]() -> std::vector<Tensor> {
      return {torch::scaled_dot_product_attention(step.q, step.k, step.v, {}, dropout)};
    });
  } else {
    const auto backend = implementation == "naive" ? AttentionBackend::reference : AttentionBackend::tiled;
    measure(benchmark, {implementation, "plain", sizes}, step, [&]() -> std::vector<Tensor> {
      return {attention(step.q, step.k, step.v, AttentionOptions().backend(backend))};
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Benchmark benchmark("attention_memory",
                      "Peak bytes of attention beside the floor: every option, and growth with the length");
  std::vector<int64_t> lengths{2049, 8193};
  std::vector<std::string> implementations{"naive", "torch dropout", "torch", "tiled"};
  AttentionSizes sizes;
  int64_t max_length = 8192;
  double scores_gib = 6;
  benchmark.add(
      {.name = "--options-at", .help = "Lengths at which every option is measured; 0: none", .target = &lengths});
  benchmark.add({.name = "--max-length",
                 .help = "Longest sequence of the growth; lengths double from 256; 0: no growth",
                 .target = &max_length});
  benchmark.add(
      {.name = "--implementation", .help = "Whose growth", .target = &implementations, .choices = implementations});
  benchmark.add({.name = "--batch", .help = "Batch size", .target = &sizes.batch, .least = 1});
  benchmark.add({.name = "--heads", .help = "Heads", .target = &sizes.heads, .least = 1});
  benchmark.add({.name = "--head-dim", .help = "Head dim", .target = &sizes.head_dim, .least = 1});
  benchmark.add({.name = "--scores-limit",
                 .help = "Leave out who stores scores where that takes more GiB than this",
                 .target = &scores_gib});
  return benchmark.run(argc, argv, [&] {
    torch::manual_seed(0);
    // Blocks of 64 KiB and more go back to the system when freed, so that the resident size follows them
    require(mallopt(M_MMAP_THRESHOLD, 64 << 10) == 1, "headroom.benchmarks.malloc",
            "mallopt refused M_MMAP_THRESHOLD; "
            "resident sizes need glibc's malloc");
    benchmark.note("machine", Row{{"cpu", processor()}, {"threads", torch::get_num_threads()}});
    std::printf(
        "%d threads; peak and floor with q, k, v and the gradient of the output; extra by the allocator and by "
        "resident size, a thread\n",
        torch::get_num_threads());
    std::printf("%-8s %-30s %-17s %7s %12s %12s %12s %12s\n", "", "variant", "pass", "length", "peak", "floor", "extra",
                "resident");
    for (const std::string& implementation : implementations) {
      for (sizes.length = 256; sizes.length <= max_length; sizes.length *= 2) {
        const double scores = static_cast<double>(sizes.batch * sizes.heads * sizes.length * sizes.length) * 4;
        const bool stored = implementation == "naive" || implementation == "torch dropout";
        if (stored && 5 * scores > scores_gib * (1 << 30)) break;
        measure_growth(benchmark, implementation, sizes);
      }
    }
    for (const int64_t length : lengths) {
      if (length == 0) continue;
      sizes.length = length;
      for (const auto& [name, make] : attention_capabilities()) {
        const AttentionStep step = make(sizes);
        measure(benchmark, {"tiled", name, sizes}, step, [&] { return step.forward(); });
      }
    }
  });
}
