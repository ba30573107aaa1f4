// train: trains the model of a configuration on a data set, such as a MUSDB18-HQ folder:
//   train --config examples/configs/musdb18_small.json --data musdb18hq --out experiments/small

#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "command_line.hpp"
#include "headroom/io/process.hpp"
#include "headroom/memory/expandable_segments.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/memory/summary.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "headroom/models/separator.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/load_model.hpp"
#include "headroom/training/models.hpp"
#include "headroom/training/out_of_memory.hpp"
#include "headroom/training/prefetch.hpp"
#include "headroom/training/redraw.hpp"
#include "headroom/training/split.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/statistics.hpp"
#include "headroom/training/trainer.hpp"
#include "headroom/training/validation.hpp"
#include "headroom/weights/tensor_map.hpp"
#include "plan_run.hpp"
#include "progress.hpp"
#include "run_folder.hpp"
#include "run_summary.hpp"
#include "watch.hpp"

namespace fs = std::filesystem;
namespace training = headroom::training;

namespace {

struct Arguments {
  fs::path config, resume, weights, data, out = "experiments/run";
  std::optional<int64_t> steps;
  std::optional<double> seconds;
  std::string device = "cpu";
  std::string card;    // whose memory to plan for; empty: this machine's when it runs on the CPU
  std::string budget;  // what tensors may take; empty: what the card has
  bool allow_partial = false, strict = false, fit = false, unplanned = false, memory_summary = false, overwrite = false;
};

// The model of a configuration, with the weights that it begins with.
headroom::models::Separator first_model(const training::Config& config, const Arguments& arguments) {
  torch::manual_seed(static_cast<uint64_t>(config.training.seed));
  headroom::models::Separator model = training::make_model(config);
  if (!arguments.weights.empty()) {
    const auto report =
        training::load_weights(model, config, arguments.weights, {.allow_partial = arguments.allow_partial});
    std::cout << "weights:  " << report.loaded.size() << " of the model's "
              << headroom::weights::tensors_of(*model).size() << " tensors from " << arguments.weights.string()
              << to_string(report) << "\n";
  }
  return model;
}

std::optional<int64_t> budget(const Arguments& arguments) {
  return arguments.budget.empty() ? std::nullopt : std::optional(parse_bytes(arguments.budget));
}

// Why memory ran out, once a run ended with an error.
void explain(const std::exception& error, training::Config config, const Arguments& arguments, int64_t peak_bytes) {
  const auto card = planned_device(arguments.card, arguments.device);
  if (!headroom::is_out_of_memory(error) || !card) return;
  if (config.training.split_on_out_of_memory) {  // single examples were the last attempt
    config.training.gradient_accumulation_steps *= std::exchange(config.training.batch_size, 1);
  }
  std::cout << training::explain_out_of_memory(config, *card, peak_bytes);
}

// Trains until the end or a signal, and shows how it goes on. A step in work is finished and saved first.
training::Summary train(training::Trainer& trainer, const training::Config& config, const Arguments& arguments,
                        Watch& watch, const std::function<std::string(int64_t)>& origin) {
  training::RunOptions options{.steps = arguments.steps,
                               .seconds = arguments.seconds,
                               .folder = arguments.out,
                               .origin = origin,
                               .stop_requested = [] { return headroom::io::stop_signal() != 0; }};
  watch.attach(options);
  headroom::io::handle_stop_signals(headroom::io::OnStop::finish_first);
  try {
    const training::Summary summary = trainer.run(options);
    watch.end(summary);
    return summary;
  } catch (const std::exception& error) {
    watch.end(error.what());
    explain(error, config, arguments, trainer.peak_bytes());
    throw;
  }
}

// Returns the exit code.
int finish(const training::Summary& summary, const training::Config& config, const Arguments& arguments) {
  const std::string last = (arguments.out / "last.pt").string();
  if (summary.stopped) {
    std::cout << "stopped after step " << summary.steps << "; go on with --resume " << last << std::endl;
    return 128 + headroom::io::stop_signal();
  }
  write_summary(arguments.out, summary, config);
  std::cout << summary.steps << " steps, " << clock_time(summary.seconds) << ", peak "
            << headroom::format_bytes(summary.peak_bytes) << ": " << last << std::endl;
  return 0;
}

int run(const Arguments& arguments) {
  std::vector<std::string> notices;
  training::Config config = training::load_config(arguments.config, &notices);
  for (const std::string& notice : notices) say("config:   " + notice);
  const fs::path data = arguments.data.empty() ? fs::path(config.data.path) : arguments.data;
  headroom::require(!data.empty(), "headroom.train.data", "no data: ", arguments.config.string(),
                    " has no data.path; give --data the folder that holds `train`");
  const torch::Device device = find_device(arguments.device);
  if (device.is_cpu()) headroom::TensorArena::install();
  auto card = planned_device(arguments.card, arguments.device);
  if (headroom::expand_segments(device) && card) card->expandable_segments = true;
  if (arguments.unplanned || !card) {
    std::cout << "memory:   not planned\n";
  } else {
    plan_run(std::cout, config, *card, {.budget = budget(arguments)}, arguments.fit);
  }
  headroom::MemoryMeter meter(device);  // before the first tensor, so that it sees them all
  const auto limit = budget(arguments);
  if (device.is_cpu() && limit) meter.set_limit(*limit + training::read_ahead_bytes(config));

  const training::Split split = training::training_split(data, config);
  const auto valid = training::validation_split(data, config);
  // Before a run in the folder is overwritten: the weights may be in it
  const headroom::models::Separator model = first_model(config, arguments);
  const auto lock = open_run_folder(arguments.out, arguments.resume, arguments.overwrite);
  for (const std::string& line : training::describe(split.dataset)) say("data:     " + line);
  model->to(device);
  training::Redraw redraw(std::cref(split), [](const std::string& text) { say("data:     " + text); });
  const training::BatchSource source = arguments.strict ? training::BatchSource(std::cref(split)) : std::ref(redraw);
  training::Prefetch examples(source, training::prefetch_options(config.training));
  training::Trainer trainer(model, config, std::ref(examples));
  if (!arguments.resume.empty()) resume_run(trainer, arguments.resume);
  training::write_atomically(arguments.out / "config.json", {training::to_json(config)});
  print_start(std::cout, config, *model, device);
  const auto origin = [&](int64_t i) { return split.dataset.origin(split.seed, redraw.drawn_as(i)); };
  Watch watch(arguments.out, config, model, valid, trainer.state().step);
  try {
    const int code = finish(train(trainer, config, arguments, watch, origin), config, arguments);
    if (arguments.memory_summary && code == 0) std::cout << headroom::memory_summary(meter);
    return code;
  } catch (const std::exception&) {
    if (arguments.memory_summary) std::cout << headroom::memory_summary(meter);
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tool("train", [&] {
    CommandLine line(
        "Trains a separator on a data set; writes last.pt, best.pt, their weights as .safetensors, config.json, "
        "metrics.jsonl, report.html and summary.json.");
    Arguments arguments;
    line.path("--config", arguments.config,
              "configuration, such as examples/configs/musdb18_small.json, or published .yaml")
        .required();
    const auto weights =
        line.path("--weights", arguments.weights, "weights to begin with: .ckpt, .pth, .safetensors or a saved state");
    weights.without(line.path("--resume", arguments.resume, "saved state to go on from, or the folder of a run"));
    line.flag("--allow-partial", arguments.allow_partial,
              "of --weights take what fits, of other sizes a part, and tell the rest")
        .needs(weights);
    line.path("--data", arguments.data,
              "data set: a folder with `train` and, optionally, `valid`, or a CSV table; default: data.path");
    line.flag("--strict", arguments.strict, "end when an audio file fails; default: leave its track out");
    line.path("--out", arguments.out, "folder for what is written").with_default();
    line.flag("--overwrite", arguments.overwrite, "start anew in a folder that holds another run");
    line.number("--steps", arguments.steps, Bounds<int64_t>{1, 1'000'000'000'000'000},
                "end at this step; default: epochs x steps_per_epoch");
    line.number("--seconds", arguments.seconds, Bounds<double>{1e-3, 1e9},
                "end after this time; the learning rate reaches its end then");
    line.threads();
    line.text("--card", arguments.card, "device profile to plan for, see plan --help; default: cpu on the CPU");
    line.text("--budget", arguments.budget, "what tensors may take, e.g. 8GiB; default: what the card has");
    line.flag("--fit", arguments.fit, "apply the smallest change that makes a run fit that does not");
    line.flag("--memory-summary", arguments.memory_summary, "end with the allocator's statistics");
    line.flag("--unplanned", arguments.unplanned, "start without planning the memory");
    line.text("--device", arguments.device, "where the model runs, e.g. cpu or cuda").with_default();
    const auto ended = line.parse(argc, argv);
    return ended ? *ended : run(arguments);
  });
}
