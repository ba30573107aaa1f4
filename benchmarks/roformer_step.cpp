// A training step (forward, loss, backward, clipping, AdamW) of BS-RoFormer and a separation by it, beside those of the
// PyPI package bs-roformer-infer with PyTorch's fused attention (roformer_step.py), on the same weights and inputs, in
// turns. Or, with --budget, one training step under the first checkpoint policy that fits: planned, counted, resident.
// Or, with --layouts, each newer layout beside the classic one; the Python model is then that of bs-roformer 1.2.

#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "headroom/memory/format.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "python_twin.hpp"
#include "resident_growth.hpp"
#include "steps.hpp"

using namespace headroom;

namespace {

/// One of several ways to train or to separate.
struct Way : benchmarks::Way {
  bool trains;
};

/// Options of the model, and whether the Python package has them together.
struct Layout {
  const char *name, *keys;
  bool in_python;
};
constexpr Layout kLayouts[] = {
    {"classic", "", false},
    {"values", R"(, "add_value_residual": true)", false},
    {"streams", R"(, "num_residual_streams": 4)", false},
    {"streams, values", R"(, "num_residual_streams": 4, "add_value_residual": true)", true},
    {"streams, values, PoPE", R"(, "num_residual_streams": 4, "add_value_residual": true, "use_pope": true)", true},
    {"window 32, sinks 4", R"(, "time_window": 32, "time_sinks": 4)", false}};

struct Sizes {
  int64_t dim = 128, depth = 6, stems = 1, segment = 131584, hop = 512, batch = 1;

  training::Config config(const Layout& layout = kLayouts[0]) const {
    std::string text = R"({"model": {"type": "bs_roformer", "time_transformer_depth": 1, "freq_transformer_depth": 1)";
    const auto number = [](const char* name, int64_t value) {
      return std::string(", \"") + name + "\": " + std::to_string(value);
    };
    text += number("dim", dim) + number("depth", depth) + number("stft_hop_length", hop) + layout.keys;
    text += R"(}, "audio": {"stems": [)";
    for (int64_t i = 0; i < stems; ++i) text += (i > 0 ? ", \"stem" : "\"stem") + std::to_string(i) + "\"";
    text += R"(]}, "training": {"seed": 0)" + number("segment_length", segment) + number("batch_size", batch) + "}}";
    return training::parse_config(text, "roformer_step");
  }
};

Way ours(const training::Config& config, bool trains, const char* policy, bool bf16,
         const benchmarks::PythonTwin& twin) {
  training::Config changed = config;
  changed.model.gradient_checkpointing = policy;
  changed.training.bf16 = bf16;
  std::string name = trains ? std::string("headroom ") + policy : "headroom";
  if (bf16) name += ", bf16";
  const auto run = [=] {
    const auto step =
        trains ? benchmarks::make_repeated_step(changed, twin) : benchmarks::make_repeated_separation(changed, twin);
    return benchmarks::measured(step, twin.steps);
  };
  return {{name, run}, trains};
}

/// What is done with the classic layout.
struct Choice {
  std::string work = "both";
  bool headline = false;
};

std::vector<Way> ways_of(const training::Config& config, const benchmarks::Python& python,
                         const benchmarks::PythonTwin& twin, const Choice& choice) {
  std::vector<Way> ways;
  const auto theirs = [&](const char* name, bool trains, const char* mode) {
    if (python.interpreter.empty()) return;
    ways.push_back({{name, [=] { return python.run(twin.file, mode); }}, trains});
  };
  if (choice.work != "separate") {
    ways.push_back(ours(config, true, "none", false, twin));
    theirs("PyTorch", true, "train");
    if (!choice.headline) {
      ways.push_back(ours(config, true, "full", false, twin));
      theirs("PyTorch, checkpointed", true, "checkpointed");
      ways.push_back(ours(config, true, "none", true, twin));
      ways.push_back(ours(config, true, "full", true, twin));
    }
  }
  if (choice.work != "step") {
    ways.push_back(ours(config, false, "none", false, twin));
    theirs("PyTorch", false, "separate");
    if (!choice.headline) ways.push_back(ours(config, false, "none", true, twin));
  }
  return ways;
}

/// A training step and a separation of each layout. Comparisons are with the classic one.
std::vector<Way> ways_of_layouts(const Sizes& sizes, const std::string& work, const benchmarks::Python& python,
                                 const benchmarks::PythonTwin& like) {
  std::vector<Way> ways;
  for (const bool trains : {true, false}) {
    if (work == (trains ? "separate" : "step")) continue;
    for (const Layout& layout : kLayouts) {
      const bool twins = layout.in_python && !python.interpreter.empty();
      const std::string twin = twins ? like.file + std::to_string(ways.size()) : "";
      ways.push_back(ours(sizes.config(layout), trains, "none", false, {twin, like.steps}));
      ways.back().name = layout.name;
      if (!twins) continue;
      const auto run = [=] { return python.run(twin, trains ? "train" : "separate"); };
      ways.push_back({{std::string("PyTorch ") + layout.name, run}, trains});
    }
  }
  return ways;
}

/// Prints and keeps what each way took, and how that compares with `reference`, the Python model's.
void report(benchmarks::Benchmark& benchmark, const std::vector<Way>& ways, const std::string& reference) {
  for (const Way& way : ways) {
    const auto theirs =
        std::ranges::find_if(ways, [&](const Way& w) { return w.trains == way.trains && w.name == reference; });
    const bool compared = theirs != ways.end();
    const double speed = compared ? theirs->best.seconds / way.best.seconds : 0;
    const double memory = compared ? static_cast<double>(way.best.memory_bytes) / theirs->best.memory_bytes : 0;
    std::printf("%-9s %-22s %9.3f %12s %8.2fx %8.2fx %12.6f %12.6f\n", way.trains ? "step" : "separate",
                way.name.c_str(), way.best.seconds, format_bytes(way.best.memory_bytes).c_str(), speed, memory,
                way.best.loss, way.best.last_loss);
    benchmark.add_row({{"work", way.trains ? "step" : "separate"},
                       {"implementation", way.name},
                       {"seconds", way.best.seconds},
                       {"memory_bytes", way.best.memory_bytes},
                       {"times_as_fast", speed},
                       {"memory_ratio", memory},
                       {"loss", way.best.loss},
                       {"last_loss", way.best.last_loss}});
  }
}

/// The first training step under the first policy that fits.
void run_within_budget(benchmarks::Benchmark& benchmark, const training::Config& config, int64_t budget) {
  const training::Config fitting = benchmarks::fitted(config, budget);
  const std::string policy = fitting.model.gradient_checkpointing.text();
  const int64_t planned = benchmarks::planned_first_step(fitting).peak_bytes;
  std::printf("policy %s, planned %s (%lld bytes)\n", policy.c_str(), format_bytes(planned).c_str(),
              static_cast<long long>(planned));
  std::fflush(stdout);
  double seconds = 0;
  int64_t counted = 0;
  const int64_t resident = benchmarks::resident_growth(
      [&] { counted = MemoryMeter().measure([&] { seconds = benchmarks::train(fitting, 1); }).added_peak(); });
  std::printf("counted %lld bytes, resident grew by %s, %.1f s\n", static_cast<long long>(counted),
              format_bytes(resident).c_str(), seconds);
  benchmark.add_row({{"policy", policy},
                     {"planned_bytes", planned},
                     {"counted_bytes", counted},
                     {"memory_bytes", resident},
                     {"seconds", seconds}});
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("roformer_step",
                                  "Seconds and memory of BS-RoFormer's training step and separation, beside the Python "
                                  "model's");
  Sizes sizes;
  Choice choice;
  std::string python, script = "benchmarks/roformer_step.py";
  int64_t steps = 2, rounds = 2, budget = 0;
  bool layouts = false;
  benchmark.add({.name = "--dim", .help = "Width of a token", .target = &sizes.dim, .least = 2});
  benchmark.add({.name = "--depth", .help = "Layers", .target = &sizes.depth, .least = 1});
  benchmark.add({.name = "--stems", .help = "Stems", .target = &sizes.stems, .least = 1});
  benchmark.add({.name = "--segment", .help = "Samples of an example", .target = &sizes.segment, .least = 4096});
  benchmark.add({.name = "--hop", .help = "Samples between frames", .target = &sizes.hop, .least = 1});
  benchmark.add({.name = "--batch", .help = "Examples", .target = &sizes.batch, .least = 1});
  benchmark.add(
      {.name = "--work", .help = "What to do", .target = &choice.work, .choices = {"step", "separate", "both"}});
  benchmark.add(
      {.name = "--steps", .help = "Steps of each in a round; the shortest counts", .target = &steps, .least = 1});
  benchmark.add({.name = "--rounds", .help = "How often all of them take their turn", .target = &rounds, .least = 1});
  benchmark.add({.name = "--budget",
                 .help = "Only a training step under the first checkpoint policy that fits so many bytes",
                 .target = &budget});
  benchmark.add({.name = "--headline", .help = "Without checkpoints and bfloat16", .target = &choice.headline});
  benchmark.add({.name = "--layouts", .help = "The newer layouts beside the classic one", .target = &layouts});
  benchmark.add({.name = "--python",
                 .help = "Also run the Python model with this interpreter, which has the package",
                 .target = &python});
  benchmark.add({.name = "--script", .help = "The script that it runs", .target = &script});
  return benchmark.run(argc, argv, [&] {
    TensorArena::install();  // as the tools do
    const benchmarks::TemporaryFolder folder;
    const benchmarks::PythonTwin twin{python.empty() ? "" : (folder.path / "step.pt").string(), steps};
    const training::Config config = sizes.config();
    if (budget > 0) return run_within_budget(benchmark, config, budget);
    std::vector<Way> ways = layouts ? ways_of_layouts(sizes, choice.work, {python, script}, twin)
                                    : ways_of(config, {python, script}, twin, choice);
    benchmark.note("processor", benchmarks::processor());
    benchmark.note("threads", torch::get_num_threads());
    benchmark.note("model", {{"dim", sizes.dim},
                             {"depth", sizes.depth},
                             {"stems", sizes.stems},
                             {"segment", sizes.segment},
                             {"hop", sizes.hop},
                             {"batch", sizes.batch}});
    benchmarks::take_turns(benchmark, ways, rounds);
    std::printf("%lld/%lld, %lld samples, %d threads\n%-9s %-22s %9s %12s %9s %9s %12s %12s\n",
                static_cast<long long>(sizes.dim), static_cast<long long>(sizes.depth),
                static_cast<long long>(sizes.segment), torch::get_num_threads(), "", "", "seconds", "resident",
                "faster", "memory", "first loss", "last loss");
    report(benchmark, ways, layouts ? kLayouts[0].name : "PyTorch");
  });
}
