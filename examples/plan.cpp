// plan: what training by a configuration will need on a device, found without running it.
//
//   plan --config examples/configs/musdb18_memory_optimized_first.json --device rtx-pro-6000-97gb --attention reference

#include "headroom/training/plan.hpp"

#include <filesystem>
#include <functional>
#include <iostream>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "command_line.hpp"
#include "headroom/io/atomic_file.hpp"
#include "headroom/plan/allocator_snapshot.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/plan/report_html.hpp"
#include "headroom/plan/report_json.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/sweep.hpp"

namespace fs = std::filesystem;
namespace training = headroom::training;

namespace {

struct Arguments {
  std::vector<fs::path> configs;
  fs::path json, trace, html, snapshot;
  std::string device = "cpu", attention, budget, sweep;
  std::vector<std::string> buckets;
  bool recommend = false;
};

// The file at `path`, if one is wanted, with what `writer` puts into a stream.
void write(const fs::path& path, const std::function<void(std::ostream&)>& writer) {
  if (!path.empty()) headroom::io::write_file(path, "headroom.plan.output", writer);
}

// Refuses, before anything is planned, to make a file where none can be.
void check_outputs(const Arguments& arguments) {
  for (const fs::path& path : {arguments.json, arguments.trace, arguments.html, arguments.snapshot}) {
    if (path.empty()) continue;
    std::error_code not_there;
    for (const fs::path& config : arguments.configs) {
      headroom::require(!fs::equivalent(path, config, not_there), "headroom.plan.output", path,
                        " is the configuration, it would be replaced; give another path");
    }
    const std::string reason = headroom::io::why_not_writable(path);
    headroom::require(reason.empty(), "headroom.plan.output", "cannot write ", path, ": ", reason,
                      "; give another path");
  }
}

headroom::PlanOptions plan_options(const Arguments& arguments) {
  headroom::PlanOptions options;
  if (!arguments.budget.empty()) options.budget = parse_bytes(arguments.budget);
  return options;
}

// A configuration, and what a published file asks for in vain.
training::Config load(const fs::path& path) {
  std::vector<std::string> notices;
  training::Config config = training::load_config(path, &notices);
  for (const std::string& notice : notices) say(path.filename().string() + ": " + notice);
  return config;
}

// All configurations at all values of one of their numbers.
int run_sweep(const Arguments& arguments) {
  std::vector<std::pair<std::string, training::Config>> configs;
  for (const fs::path& path : arguments.configs) configs.emplace_back(path.stem().string(), load(path));
  const int64_t rate = configs.front().second.audio.sample_rate;
  const training::Sweep sweep = training::parse_sweep(arguments.sweep, rate, configs.front().second);
  const headroom::DeviceProfile device = training::find_device_profile(arguments.device);
  const headroom::PlanOptions options = plan_options(arguments);
  const auto rows = training::plan_sweep(configs, sweep, device, options);
  training::print_sweep(std::cout, rows, sweep, device, [&](int64_t value) {
    std::ostringstream text;
    sweep.key == "segment_length" ? text << static_cast<double>(value) / static_cast<double>(rate) << " s"
                                  : text << value;
    return text.str();
  });
  write(arguments.json, [&](std::ostream& out) {
    out << training::sweep_json(rows, sweep, device, options.budget.value_or(device.usable_bytes()));
  });
  return 0;
}

// Returns the exit code: 0 fits, 3 does not fit.
int run(const Arguments& arguments) {
  check_outputs(arguments);
  if (!arguments.sweep.empty()) return run_sweep(arguments);
  headroom::require(arguments.configs.size() == 1, "headroom.plan.configs", "got ", arguments.configs.size(),
                    " configurations; give one, or --sweep for a table of several");
  const fs::path& path = arguments.configs.front();
  training::Config config = load(path);
  if (!arguments.attention.empty()) config.model.attention = arguments.attention;
  const headroom::DeviceProfile device = training::find_device_profile(arguments.device);
  if (config.model.attention == "tiled" && !device.device().is_cpu()) {
    std::cout << "tiled attention is the CPU's; " << device.name << " is planned with what serves it without stored "
              << "scores: automatic\n";
    config.model.attention = "automatic";
  }
  const headroom::PlanOptions options = plan_options(arguments);
  std::vector<training::Bucket> buckets;
  for (const std::string& text : arguments.buckets) {
    buckets.push_back(training::parse_bucket(text, config.audio.sample_rate));
  }
  const training::BucketPlan all = training::plan_buckets(
      config, buckets.empty() ? std::vector{training::bucket_of(config)} : buckets, device, options);
  const headroom::Plan& plan = all.plan;
  headroom::print_plan(std::cout, plan);
  if (!buckets.empty()) training::print_buckets(std::cout, all);
  std::cout << headroom::explain(plan);
  if (arguments.recommend) std::cout << training::describe(training::recommend(config, device, options, buckets));
  write(arguments.json, [&](std::ostream& out) { out << training::plan_json(all); });
  write(arguments.trace, [&](std::ostream& out) { headroom::write_plan_trace(out, plan); });
  write(arguments.snapshot, [&](std::ostream& out) { out << headroom::plan_snapshot(plan); });
  write(arguments.html,
        [&](std::ostream& out) { out << headroom::plan_html(plan, path.filename().string() + " on " + device.name); });
  return plan.fits ? 0 : 3;
}

}  // namespace

int main(int argc, char** argv) {
  return run_tool("plan", [&] {
    CommandLine line(
        "Tells what training by a configuration will need, without running it. Exit code 3: it does not fit.");
    Arguments arguments;
    std::string devices = "cpu";
    for (const auto& profile : headroom::known_devices()) devices += ", " + profile.name;
    line.paths("--config", arguments.configs,
               "configuration, such as examples/configs/musdb18_small.json, or published .yaml; several for --sweep")
        .required();
    line.text("--device", arguments.device, devices + ", or a profile that ends with .json").with_default();
    line.text("--budget", arguments.budget, "what tensors may take, e.g. 24GiB; default: what the device has");
    line.text("--attention", arguments.attention, "instead of the configuration's")
        .one_of({"automatic", "tiled", "reference"});
    line.texts("--bucket", arguments.buckets,
               "batches of this shape instead of the configuration's, e.g. 8x3s; several, as in --bucket 8x3s 4x6s, "
               "follow each other in any order")
        .without(line.text("--sweep", arguments.sweep,
                           "a table over values of a number, e.g. segment_length=3s..15s or batch_size=1,2,4; "
                           "takes --json"));
    line.flag("--recommend", arguments.recommend, "name the smallest change that fits");
    line.path("--json", arguments.json, "write the plan as JSON");
    line.path("--trace", arguments.trace, "write a trace for ui.perfetto.dev");
    line.path("--snapshot", arguments.snapshot, "write a memory snapshot for pytorch.org/memory_viz");
    line.path("--html", arguments.html, "write a web page");
    const auto ended = line.parse(argc, argv);
    return ended ? *ended : run(arguments);
  });
}
