// One training step (forward, loss, backward, clipping, AdamW) of whole configurations, without recomputation, beside
// the same step in plain PyTorch (train_step.py), eager and compiled, on the same weights and inputs.

#include <torch/torch.h>

#include <cstdio>
#include <filesystem>

#include "headroom/memory/format.hpp"
#include "headroom/memory/resident.hpp"
#include "python_twin.hpp"
#include "steps.hpp"
#include "timing.hpp"

namespace fs = std::filesystem;
using namespace headroom;

namespace {

/// The trainer's steps. Memory is what the device's allocator peaked at, on the CPU what the resident size grew by.
benchmarks::Measurement run_ours(const training::Config& config, const benchmarks::PythonTwin& twin,
                                 const benchmarks::Accelerator* gpu) {
  const auto step = benchmarks::make_repeated_step(config, twin, gpu);
  std::vector<double> losses;
  benchmarks::Measurement result;
  const auto once = [&] { losses.push_back(step()); };
  const auto all = [&] {
    result.seconds = benchmarks::shortest_of([&] { return benchmarks::seconds_on(gpu, once); },
                                             {.warm_up = false, .least = static_cast<int>(twin.steps)});
  };
  if (gpu != nullptr) {
    result.memory_bytes = gpu->peak_of(all).allocated;
  } else {
    reset_peak_resident_bytes();
    const int64_t before = resident_bytes();
    all();
    result.memory_bytes = peak_resident_bytes() - before;
  }
  result.loss = losses.front(), result.last_loss = losses.back();
  return result;
}

/// Prints and keeps the measurements of one configuration.
struct Table {
  benchmarks::Benchmark& benchmark;
  std::string configuration;
  int64_t segment_length;

  void add(const char* implementation, const benchmarks::Measurement& now) const {
    std::printf("%-24s %-10s %10.3f %14s %12.6f %12.6f\n", configuration.c_str(), implementation, now.seconds,
                format_bytes(now.memory_bytes).c_str(), now.loss, now.last_loss);
    std::fflush(stdout);
    benchmark.add_row({{"seconds", now.seconds},
                       {"memory_bytes", now.memory_bytes},
                       {"loss", now.loss},
                       {"last_loss", now.last_loss},
                       {"configuration", configuration},
                       {"implementation", implementation},
                       {"segment_length", segment_length}});
  }
  void compare(const benchmarks::Measurement& ours, const benchmarks::Measurement& theirs) const {
    std::printf("%-24s %-10s %9.2fx %13.2fx %12.1e %12.1e\n", configuration.c_str(), "ratio",
                theirs.seconds / ours.seconds,
                static_cast<double>(ours.memory_bytes) / static_cast<double>(theirs.memory_bytes),
                theirs.loss / ours.loss - 1, theirs.last_loss / ours.last_loss - 1);
  }
};

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("train_step", "Seconds and memory of one training step, beside plain PyTorch's");
  std::vector<std::string> files = {"examples/configs/demo.json", "examples/configs/musdb18_small.json"};
  std::string python, script = "benchmarks/train_step.py", device = "cpu";
  int64_t steps = 5, segment = 0;
  bool bf16 = false, compiled = false;
  benchmark.add(
      {.name = "configurations", .help = "Configuration files, those with small models first", .target = &files});
  benchmark.add({.name = "--python",
                 .help = "Also run the same steps in plain PyTorch with this interpreter",
                 .target = &python});
  benchmark.add({.name = "--script", .help = "The script that it runs", .target = &script});
  benchmark.add({.name = "--steps", .help = "Steps of each; the shortest counts", .target = &steps, .least = 2});
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
    std::printf("%-24s %-10s %10s %14s %12s %12s\n", "", "", "seconds", gpu ? "peak" : "resident", "first loss",
                "last loss");
    for (const std::string& file : files) {
      training::Config config = training::load_config(file);
      config.model.gradient_checkpointing = false;
      config.training.gradient_accumulation_steps = 1;  // as the twin
      config.training.bf16 = bf16;
      if (segment > 0) config.training.segment_length = segment;
      const Table table{benchmark, fs::path(file).stem().string(), config.training.segment_length};
      const benchmarks::TemporaryFolder folder;
      const std::string step_file = python.empty() ? "" : (folder.path / "step.pt").string();
      const benchmarks::PythonTwin twin{step_file, steps};
      const benchmarks::Measurement ours = run_ours(config, twin, gpu ? &*gpu : nullptr);
      table.add("headroom", ours);
      if (python.empty()) continue;
      if (gpu) gpu->allocator->emptyCache();  // the twin is another process
      for (const char* mode : {"eager", "compiled"}) {
        if (mode == std::string("compiled") && !compiled) continue;
        const benchmarks::Measurement theirs = benchmarks::Python{python, script}.run(twin.file, mode);
        table.add(mode, theirs);
        table.compare(ours, theirs);
      }
    }
  });
}
