// One training step (forward, loss, backward, clipping, AdamW) of whole configurations, without recomputation, beside
// the same step in plain PyTorch (train_step.py), eager and compiled, on the same weights and inputs, in turns.

#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "headroom/memory/format.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "python_twin.hpp"
#include "steps.hpp"

namespace fs = std::filesystem;
using namespace headroom;

namespace {

/// Prints and keeps what each way took with a configuration; the first is ours.
void report(benchmarks::Benchmark& benchmark, const std::string& configuration, int64_t segment_length,
            const std::vector<benchmarks::Way>& ways) {
  for (const benchmarks::Way& way : ways) {
    const benchmarks::Measurement &now = way.best, &ours = ways.front().best;
    const double faster = now.seconds / ours.seconds;
    const double memory = static_cast<double>(ours.memory_bytes) / static_cast<double>(now.memory_bytes);
    std::printf("%-24s %-10s %10.3f %14s %12.6f %12.6f %7.2fx %7.2fx\n", configuration.c_str(), way.name.c_str(),
                now.seconds, format_bytes(now.memory_bytes).c_str(), now.loss, now.last_loss, faster, memory);
    benchmark.add_row({{"seconds", now.seconds},
                       {"memory_bytes", now.memory_bytes},
                       {"loss", now.loss},
                       {"last_loss", now.last_loss},
                       {"headroom_times_as_fast", faster},
                       {"headroom_memory_ratio", memory},
                       {"configuration", configuration},
                       {"implementation", way.name},
                       {"segment_length", segment_length}});
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("train_step", "Seconds and memory of one training step, beside plain PyTorch's");
  std::vector<std::string> files = {"examples/configs/demo.json", "examples/configs/musdb18_small.json"};
  std::string python, script = "benchmarks/train_step.py", device = "cpu";
  int64_t steps = 5, rounds = 2, segment = 0;
  bool bf16 = false, compiled = false;
  benchmark.add(
      {.name = "configurations", .help = "Configuration files, those with small models first", .target = &files});
  benchmark.add({.name = "--python",
                 .help = "Also run the same steps in plain PyTorch with this interpreter",
                 .target = &python});
  benchmark.add({.name = "--script", .help = "The script that it runs", .target = &script});
  benchmark.add(
      {.name = "--steps", .help = "Steps of each in a round; the shortest counts", .target = &steps, .least = 2});
  benchmark.add({.name = "--rounds", .help = "How often all of them take their turn", .target = &rounds, .least = 1});
  benchmark.add(
      {.name = "--segment", .help = "Samples of an example, instead of the configuration's (0)", .target = &segment});
  benchmark.add({.name = "--device",
                 .help = "Where the steps run; memory is what its allocator peaked at, on the CPU resident",
                 .target = &device});
  benchmark.add({.name = "--bf16", .help = "Under bfloat16 autocast", .target = &bf16});
  benchmark.add({.name = "--compiled", .help = "Also PyTorch with torch.compile", .target = &compiled});
  return benchmark.run(argc, argv, [&] {
    benchmark.note("threads", torch::get_num_threads());
    std::optional<benchmarks::Accelerator> gpu;
    if (device != "cpu") benchmark.note("machine", gpu.emplace(device).describe());
    benchmark.note("device", device);
    if (!gpu) TensorArena::install();  // as train does
    std::printf("%-24s %-10s %10s %14s %12s %12s %8s %8s\n", "", "", "seconds", gpu ? "peak" : "resident", "first loss",
                "last loss", "faster", "memory");
    for (const std::string& file : files) {
      training::Config config = training::load_config(file);
      config.model.gradient_checkpointing = false;
      config.training.gradient_accumulation_steps = 1;  // as the twin
      config.training.bf16 = bf16;
      if (segment > 0) config.training.segment_length = segment;
      const benchmarks::TemporaryFolder folder;
      const benchmarks::PythonTwin twin{python.empty() ? "" : (folder.path / "step.pt").string(), steps};
      const benchmarks::Accelerator* const accelerator = gpu ? &*gpu : nullptr;
      const auto ours = [&] {
        return benchmarks::measured(benchmarks::make_repeated_step(config, twin, accelerator), steps, accelerator);
      };
      std::vector<benchmarks::Way> ways = {{"headroom", ours}};
      const auto theirs = [&](const char* mode) {
        if (gpu) gpu->allocator->emptyCache();  // the twin is another process
        return benchmarks::Python{python, script}.run(twin.file, mode);
      };
      if (!python.empty()) ways.push_back({"eager", [&] { return theirs("eager"); }});
      if (!python.empty() && compiled) ways.push_back({"compiled", [&] { return theirs("compiled"); }});
      benchmarks::take_turns(benchmark, ways, rounds);
      report(benchmark, fs::path(file).stem().string(), config.training.segment_length, ways);
    }
  });
}
