// What each checkpoint policy needs, in memory and time: an encoder whose attention dominates, measured; the guide's
// configurations, planned; and the headline, one full training step of the guide's first memory_optimized
// configuration, whose attention once asked for 80.89 GiB in one tensor.

#include <torch/torch.h>

#include <cstdio>
#include <sstream>

#include "headroom/memory/meter.hpp"
#include "headroom/memory/resident.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "steps.hpp"
#include "timing.hpp"

using namespace headroom;
using benchmarks::EncoderSizes;
using benchmarks::Planned;
using torch::Tensor;

namespace {

const std::vector<std::string> kPolicies = {
    "none",     "selective", "selective+offload", "every-3",       "full",        "full+bf16", "full+offload", "nested",
    "nested-3", "tiled",     "tiled+bf16",        "tiled+offload", "tiled+nested"};

struct Measurement {
  int64_t peak_bytes = 0, resident_peak_bytes = 0;
  double seconds = 0;
};

/// Runs `step`, which returns the seconds of what counts in it.
Measurement measured(const std::function<double()>& step) {
  TensorArena::instance().release_free_pages();
  reset_peak_resident_bytes();
  double seconds = 0;
  const MemoryReport memory = MemoryMeter().measure([&] { seconds = step(); });
  return {memory.added_peak(), peak_resident_bytes(), seconds};
}

/// A row of the table.
struct Entry {
  std::string configuration, policy;
  int64_t planned = 0;
  std::optional<Measurement> real = {};
  benchmarks::Row more = {};  ///< further figures
};

class Table {
 public:
  explicit Table(benchmarks::Benchmark& benchmark) : benchmark_(benchmark) {
    std::printf("%-26s %-18s %12s %12s %12s %10s\n", "configuration", "policy", "planned", "peak", "resident",
                "seconds");
  }

  void add(const Entry& entry) {
    const auto& real = entry.real;
    benchmarks::Row row = {{"configuration", entry.configuration},
                           {"policy", entry.policy},
                           {"peak_bytes", {}},
                           {"resident_peak_bytes", {}},
                           {"seconds", {}},
                           {"planned_bytes", entry.planned}};
    std::printf("%-26s %-18s %12s", entry.configuration.c_str(), entry.policy.c_str(),
                format_bytes(entry.planned).c_str());
    if (real) {
      row[2].second = real->peak_bytes, row[3].second = real->resident_peak_bytes, row[4].second = real->seconds;
      std::printf(" %12s %12s %10.2f%s", format_bytes(real->peak_bytes).c_str(),
                  format_bytes(real->resident_peak_bytes).c_str(), real->seconds,
                  real->peak_bytes == entry.planned ? "" : "  not as planned");
    }
    std::printf("\n");
    std::fflush(stdout);
    row.insert(row.end(), entry.more.begin(), entry.more.end());
    benchmark_.add_row(row);
  }

 private:
  benchmarks::Benchmark& benchmark_;
};

/// Seconds of forward and backward; the gradients of the parameters are there before.
double run_encoder(const EncoderSizes& sizes, const std::string& policy) {
  const auto [encoder, x, step] = benchmarks::make_encoder_step(sizes, policy);
  for (const Tensor& p : encoder->parameters()) p.mutable_grad() = torch::zeros_like(p);
  return benchmarks::seconds_of(step);
}
/// Parameters, their gradients and the input.
int64_t fixed_bytes(const EncoderSizes& sizes) {
  const auto [encoder, x, step] = benchmarks::make_encoder_step(sizes, "none");
  auto bytes = static_cast<int64_t>(x.nbytes());
  for (const Tensor& p : encoder->parameters()) bytes += 2 * static_cast<int64_t>(p.nbytes());
  return bytes;
}

/// Every policy in turns, `repetitions` times.
void measure_encoder(Table& table, const EncoderSizes& sizes, const std::vector<std::string>& policies,
                     int repetitions) {
  EncoderSizes small = sizes;
  small.layers = 1;
  for (const auto& policy : {"none", "tiled"}) run_encoder(small, policy);  // what a process loads once
  std::ostringstream name;
  name << "encoder " << sizes.layers << " x " << sizes.length << ", " << at::IntArrayRef(sizes.hidden);
  std::vector<Measurement> best(policies.size());
  std::vector<benchmarks::Contender> contenders;
  for (size_t i = 0; i < policies.size(); ++i) {
    contenders.push_back({policies[i], [&, i] {
                            const Measurement now = measured([&] { return run_encoder(sizes, policies[i]); });
                            if (now.seconds < contenders[i].best) best[i] = now;
                            return now.seconds;
                          }});
  }
  benchmarks::race(contenders, {.warm_up = false, .least = repetitions});
  const int64_t fixed = fixed_bytes(sizes);
  for (size_t i = 0; i < policies.size(); ++i) {
    const Planned planned = benchmarks::planned([&] { run_encoder(sizes, policies[i]); });
    table.add({name.str(),
               policies[i],
               planned.peak_bytes,
               best[i],
               {{"what", "forward and backward"},
                {"activation_bytes", planned.peak_bytes - fixed},
                {"flops", planned.flops}}});
  }
}

training::Config guide(const std::string& folder, const std::string& name) {
  training::Config config = training::load_config(folder + "/musdb18_" + name + ".json");
  config.training.gradient_accumulation_steps = 1;
  config.training.batch_size = 1;
  return config;
}

void plan_guide(Table& table, const std::string& folder) {
  for (const char* name : {"small", "ultra_safe", "memory_optimized", "memory_optimized_first", "xlarge"}) {
    for (const std::string& policy : kPolicies) {
      training::Config config = guide(folder, name);
      config.model.gradient_checkpointing = policy;
      const Planned planned = benchmarks::planned_first_step(config);
      table.add({name, policy, planned.peak_bytes, {}, {{"what", "training step"}, {"flops", planned.flops}}});
    }
  }
}

/// Plans first and refuses to run what does not fit.
void run_headline(Table& table, const std::string& folder, const std::string& name, int64_t budget) {
  const training::Config config = benchmarks::fitted(guide(folder, name), budget);
  const Planned before = benchmarks::planned_first_step(config);
  const std::string policy = config.model.gradient_checkpointing.text();
  std::printf("%s: policy %s, planned peak %s of %s, %.0f TFLOP\n", name.c_str(), policy.c_str(),
              format_bytes(before.peak_bytes).c_str(), format_bytes(budget).c_str(), before.flops * 1e-12);
  std::fflush(stdout);
  torch::manual_seed(0);
  const Measurement real = measured([&] { return benchmarks::train(config, 1); });
  // The step chose which kernel multiplies what: until a product's was chosen it needed what the plan before it says,
  // from then on what a plan after it says
  const int64_t after = benchmarks::planned_first_step(config).peak_bytes;
  table.add({name,
             policy,
             real.peak_bytes == before.peak_bytes ? before.peak_bytes : after,
             real,
             {{"what", "training step"}, {"planned_before_bytes", before.peak_bytes}, {"flops", before.flops}}});
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("recompute", "Memory and time of checkpoint policies");
  bool headline = false, no_guide = false;
  std::string folder = "examples/configs", configuration = "memory_optimized_first";
  double budget_gib = 7.5;  // of 8 GiB resident: the rest is for what is no tensor
  EncoderSizes encoder;
  std::vector<std::string> policies = kPolicies;
  policies.emplace_back("reversible");
  int repetitions = 1;
  benchmark.add({.name = "--headline",
                 .help = "Only one training step of one of the guide's configurations, batch 1",
                 .target = &headline});
  benchmark.add({.name = "--configuration", .help = "Which one the headline is", .target = &configuration});
  benchmark.add({.name = "--budget", .help = "GiB that tensors of the headline may take", .target = &budget_gib});
  benchmark.add({.name = "--configs", .help = "Folder of the guide's configurations", .target = &folder});
  benchmark.add(
      {.name = "--no-guide", .help = "Leave out the plans of the guide's configurations", .target = &no_guide});
  benchmark.add({.name = "--policies", .help = "Policies to measure on the encoder", .target = &policies});
  benchmark.add({.name = "--layers", .help = "Blocks of the encoder", .target = &encoder.layers, .least = 1});
  benchmark.add({.name = "--batch", .help = "Sequences that it works on", .target = &encoder.batch, .least = 1});
  benchmark.add({.name = "--length", .help = "Their length", .target = &encoder.length, .least = 1});
  benchmark.add({.name = "--hidden", .help = "Hidden widths of its feed-forward networks", .target = &encoder.hidden});
  benchmark.add({.name = "--repetitions",
                 .help = "Steps of each policy, in turn; the shortest counts",
                 .target = &repetitions,
                 .least = 1});
  return benchmark.run(argc, argv, [&] {
    benchmark.note("processor", benchmarks::processor());
    benchmark.note("threads", torch::get_num_threads());
    Table table(benchmark);
    if (headline) {
      return run_headline(table, folder, configuration, static_cast<int64_t>(budget_gib * (int64_t{1} << 30)));
    }
    measure_encoder(table, encoder, policies, repetitions);
    if (!no_guide) plan_guide(table, folder);
  });
}
