// What each checkpoint policy needs, in memory and time: an encoder whose attention dominates, measured; the guide's
// configurations, planned; and the headline, one full training step of the guide's first memory_optimized
// configuration, whose attention once asked for 80.89 GiB in one tensor.

#include <malloc.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
#include "headroom/training.hpp"
#include "noise_source.hpp"
#include "report.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

const std::vector<std::string> kPolicies = {
    "none",     "selective", "selective+offload", "every-3",       "full",        "full+bf16", "full+offload", "nested",
    "nested-3", "tiled",     "tiled+bf16",        "tiled+offload", "tiled+nested"};
const std::string kReversible = "reversible";  // another model, not a policy

struct Measurement {
  int64_t peak_bytes, resident_peak_bytes;
  double seconds;
};

/// Runs `step`, which returns the seconds of what counts in it.
template <class Step>
Measurement measured(const Step& step) {
  ::malloc_trim(0);
  reset_peak_resident_bytes();
  double seconds = 0;
  const MemoryReport memory = MemoryMeter().measure([&] { seconds = step(); });
  return {memory.added_peak(), peak_resident_bytes(), seconds};
}

template <class Body>
double seconds_of(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Table {
 public:
  explicit Table(nlohmann::ordered_json& rows) : rows_(rows) {}

  /// A plan, and what was measured, if anything was. Further figures go into the row as they are.
  void add(const std::string& configuration, const std::string& policy, int64_t planned,
           const std::optional<Measurement>& real, const nlohmann::ordered_json& more = {}) {
    if (rows_.empty()) {
      std::printf("%-26s %-18s %12s %12s %12s %10s\n", "configuration", "policy", "planned", "peak", "resident",
                  "seconds");
    }
    nlohmann::ordered_json row = {{"configuration", configuration}, {"policy", policy},         {"peak_bytes", nullptr},
                                  {"resident_peak_bytes", nullptr}, {"planned_bytes", planned}, {"seconds", nullptr}};
    std::printf("%-26s %-18s %12s", configuration.c_str(), policy.c_str(), format_bytes(planned).c_str());
    if (real) {
      row["peak_bytes"] = real->peak_bytes;
      row["resident_peak_bytes"] = real->resident_peak_bytes;
      row["seconds"] = real->seconds;
      std::printf(" %12s %12s %10.2f%s", format_bytes(real->peak_bytes).c_str(),
                  format_bytes(real->resident_peak_bytes).c_str(), real->seconds,
                  real->peak_bytes == planned ? "" : "  not as planned");
    }
    std::printf("\n");
    std::fflush(stdout);
    row.update(more);
    rows_.push_back(row);
  }

 private:
  nlohmann::ordered_json& rows_;
};

/// A stack of axial blocks over tokens [batch, length, dim], forward and backward.
struct EncoderStep {
  int64_t layers, batch, length, dim, heads;
  std::vector<int64_t> hidden;

  /// Seconds of forward and backward; the gradients of the parameters are there before.
  double operator()(const std::string& policy) const {
    nn::EncoderOptions options(dim, heads, hidden, layers);
    if (policy == kReversible) {
      options.reversible(true);
    } else {
      options.gradient_checkpointing(policy);
    }
    nn::Encoder encoder(options);
    for (const Tensor& p : encoder->parameters()) p.mutable_grad() = torch::zeros_like(p);
    const Tensor x = torch::randn({batch, length, dim});
    return seconds_of([&] { encoder->forward(x).square().mean().backward(); });
  }
  /// Parameters, their gradients and x.
  int64_t fixed_bytes() const {
    nn::Encoder encoder(nn::EncoderOptions(dim, heads, hidden, layers));
    int64_t bytes = batch * length * dim * 4;
    for (const Tensor& p : encoder->parameters()) bytes += 2 * static_cast<int64_t>(p.nbytes());
    return bytes;
  }
};

/// One optimizer step of a trainer, model and optimizer state included: its seconds.
template <class Source>
double train_step(const training::Config& config, Source source) {
  const models::Separator model = training::make_model(config);
  training::Trainer trainer(model, config, std::move(source));
  return seconds_of([&] { trainer.step(config.training.learning_rate); });
}

training::Config guide(const std::string& folder, const std::string& name) {
  training::Config config = training::load_config(folder + "/musdb18_" + name + ".json");
  config.training.gradient_accumulation_steps = 1;
  config.training.batch_size = 1;
  return config;
}

Plan planned_step(const training::Config& config) {
  return plan([&] { train_step(config, training::ShapeSource{config}); }, this_machine(), {.value = 1});
}

/// Plans first and refuses to run what does not fit.
void run_headline(Table& table, const std::string& folder, const std::string& name, int64_t budget) {
  const auto found = training::recommend(guide(folder, name), this_machine(), {.budget = budget});
  require(found && found->same_training, "headroom.benchmarks.headline", "nothing fits ", format_bytes(budget),
          "; give a larger --budget");
  const training::Config& config = found->config;
  const Plan before = planned_step(config);
  std::printf("%s: policy %s, planned peak %s of %s, %.0f TFLOP\n", name.c_str(),
              config.model.gradient_checkpointing.text().c_str(), format_bytes(before.peak_bytes).c_str(),
              format_bytes(budget).c_str(), before.flops * 1e-12);
  std::fflush(stdout);
  torch::manual_seed(0);
  const Measurement real = measured([&] { return train_step(config, benchmarks::NoiseSource{{config}}); });
  // The step chose which kernel multiplies what: until a product's was chosen it needed what the plan before it says,
  // from then on what a plan after it says
  const int64_t after = planned_step(config).peak_bytes;
  table.add(name, config.model.gradient_checkpointing.text(),
            real.peak_bytes == before.peak_bytes ? before.peak_bytes : after, real,
            {{"what", "training step"}, {"planned_before_bytes", before.peak_bytes}, {"flops", before.flops}});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Memory and time of checkpoint policies", "recompute");
  benchmarks::Report report;
  bool headline = false, no_guide = false;
  std::string folder = "examples/configs", configuration = "memory_optimized_first";
  double budget_gib = 7.5;  // of 8 GiB resident: the rest is for what is no tensor
  EncoderStep encoder{.layers = 12, .batch = 2, .length = 2049, .dim = 192, .heads = 12, .hidden = {768, 768}};
  std::vector<std::string> policies = kPolicies;
  policies.push_back(kReversible);
  int repetitions = 1;
  app.add_flag("--headline", headline, "Only one training step of one of the guide's configurations, batch 1");
  app.add_option("--configuration", configuration, "Which one the headline is")->capture_default_str();
  app.add_option("--budget", budget_gib, "GiB that tensors of the headline may take")->capture_default_str();
  app.add_option("--configs", folder, "Folder of the guide's configurations")->capture_default_str();
  app.add_flag("--no-guide", no_guide, "Leave out the plans of the guide's configurations");
  app.add_option("--policies", policies, "Policies to measure on the encoder")->capture_default_str();
  app.add_option("--layers", encoder.layers, "Blocks of the encoder")->capture_default_str();
  app.add_option("--batch", encoder.batch, "Sequences that it works on")->capture_default_str();
  app.add_option("--length", encoder.length, "Their length")->capture_default_str();
  app.add_option("--hidden", encoder.hidden, "Hidden widths of its feed-forward networks")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--repetitions", repetitions, "Steps of each policy, in turn; the shortest counts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    if (report.threads > 0) torch::set_num_threads(report.threads);
    report.json = {{"processor", benchmarks::processor()},
                   {"threads", torch::get_num_threads()},
                   {"rows", nlohmann::json::array()}};
    Table table(report.json["rows"]);
    if (headline) {
      return run_headline(table, folder, configuration, static_cast<int64_t>(budget_gib * (int64_t{1} << 30)));
    }

    EncoderStep small = encoder;
    small.layers = 1;
    for (const auto& policy : {"none", "tiled"}) small(policy);  // what a process loads once
    std::ostringstream name;
    name << "encoder " << encoder.layers << " x " << encoder.length << ", " << at::IntArrayRef(encoder.hidden);
    std::vector<std::optional<Measurement>> best(policies.size());
    for (int repetition = 0; repetition < repetitions; ++repetition) {
      for (size_t i = 0; i < policies.size(); ++i) {
        const Measurement now = measured([&] { return encoder(policies[i]); });
        if (!best[i] || now.seconds < best[i]->seconds) best[i] = now;
      }
    }
    for (size_t i = 0; i < policies.size(); ++i) {
      const Plan planned = plan([&] { encoder(policies[i]); }, this_machine());
      table.add(name.str(), policies[i], planned.peak_bytes, best[i],
                {{"what", "forward and backward"},
                 {"activation_bytes", planned.peak_bytes - encoder.fixed_bytes()},
                 {"flops", planned.flops}});
    }
    if (no_guide) return;
    for (const char* configuration : {"small", "ultra_safe", "memory_optimized", "memory_optimized_first", "xlarge"}) {
      for (const std::string& policy : kPolicies) {
        training::Config config = guide(folder, configuration);
        config.model.gradient_checkpointing = policy;
        const Plan planned = planned_step(config);
        table.add(configuration, policy, planned.peak_bytes, std::nullopt,
                  {{"what", "training step"}, {"flops", planned.flops}});
      }
    }
  });
}
