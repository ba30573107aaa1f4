// train: trains the time-frequency transformer on a MUSDB18-HQ folder.
//
//   train --config examples/configs/musdb18_small.json --data musdb18hq --out experiments/small

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "command_line.hpp"
#include "headroom/io/folder_lock.hpp"
#include "headroom/io/process.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/memory/run_within.hpp"
#include "headroom/memory/summary.hpp"
#include "headroom/models/time_frequency_transformer.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/training/config.hpp"
#include "headroom/training/dataset.hpp"
#include "headroom/training/out_of_memory.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/trainer.hpp"
#include "progress.hpp"

namespace fs = std::filesystem;
namespace training = headroom::training;

namespace {

struct Arguments {
  fs::path config, resume, data, out = "experiments/run";
  std::optional<int64_t> steps;
  std::optional<double> seconds;
  int threads = 0;  // 0: LibTorch's choice
  std::string device = "cpu";
  std::string card;    // whose memory to plan for; empty: this machine's when it runs on the CPU
  std::string budget;  // what tensors may take; empty: what the card has
  bool fit = false, unplanned = false, memory_summary = false, overwrite = false;
};

// The folder of a run, made and locked. One that holds another run is only used when it is asked for: to go on from a
// checkpoint in it, or by --overwrite.
headroom::io::FolderLock open_run_folder(const Arguments& arguments) {
  const fs::path& out = arguments.out;
  std::error_code failure;
  fs::create_directories(out, failure);
  headroom::require(!failure && fs::is_directory(out), "headroom.train.output", "cannot make the folder ", out.string(),
                    ": ", failure.message(), "; give --out another one");
  headroom::io::FolderLock lock(out, "headroom.train.locked");
  const fs::path from = arguments.resume.has_parent_path() ? arguments.resume.parent_path() : ".";
  const bool goes_on = !arguments.resume.empty() && fs::equivalent(from, out, failure);
  for (const char* name : {"last.pt", "best.pt", "summary.json"}) {
    headroom::require(goes_on || arguments.overwrite || !fs::exists(out / name, failure), "headroom.train.used",
                      "there is a run in ", out.string(), " already, with ", name,
                      "; go on with --resume, give --out another folder, or --overwrite to lose it");
  }
  return lock;
}

// Examples of one split: a source of batches for the trainer.
struct Split {
  training::MusdbDataset dataset;
  uint64_t seed;

  training::Example operator()(int64_t first, int64_t count) const { return dataset.batch(seed, first, count); }
};

training::MusdbOptions dataset_options(const training::Config& config) {
  return {.segment_length = config.training.segment_length,
          .channels = config.audio.channels,
          .sample_rate = config.audio.sample_rate,
          .stems = config.audio.stems,
          .draw = config.data.draw == "uniform" ? training::TrackDraw::uniform : training::TrackDraw::by_length,
          .remix = config.data.remix,
          .gain = config.data.gain,
          .swap_channels = config.data.swap_channels,
          .flip_polarity = config.data.flip_polarity};
}

// What the model is validated on: music as it is, the same segments each time. Without a `valid` folder there is none.
std::optional<Split> validation_split(const fs::path& data, const training::Config& config) {
  if (!fs::is_directory(data / "valid")) {
    return std::nullopt;
  }
  training::MusdbOptions options = dataset_options(config);
  options.remix = 0;
  return Split{training::MusdbDataset(data / "valid", options), 0};
}

void print_start(const training::Config& config, const headroom::models::TimeFrequencyTransformer& model,
                 const Arguments& arguments) {
  const auto& options = model->options;
  const auto& run = config.training;
  int64_t parameters = 0;
  for (const torch::Tensor& parameter : model->parameters()) {
    parameters += parameter.numel();
  }
  const int64_t frames = options.frames(run.segment_length);
  std::cout << "model:    " << parameters << " parameters, " << options.n_layers() << " layers, width "
            << options.emb_dim() << ", " << options.n_heads() << " heads\n"
            << "tokens:   " << frames * options.bins() << " a segment (" << frames << " frames x " << options.bins()
            << " bins), batch " << run.batch_size << " x " << run.gradient_accumulation_steps << "\n"
            << "device:   " << arguments.device << ", " << torch::get_num_threads() << " threads\n"
            << "stored attention scores would take "
            << headroom::format_bytes(
                   headroom::models::stored_scores_bytes(options, run.batch_size, run.segment_length))
            << " a step; "
            << (options.attention() == headroom::AttentionBackend::reference ? "this backend stores them"
                                                                             : "none are stored")
            << std::endl;
}

std::optional<int64_t> budget(const Arguments& arguments) {
  return arguments.budget.empty() ? std::nullopt : std::optional(parse_bytes(arguments.budget));
}

// The device to plan for; none when it is not known.
std::optional<headroom::DeviceProfile> planned_device(const Arguments& arguments) {
  if (arguments.card.empty() && arguments.device != "cpu") return std::nullopt;
  return training::find_device_profile(arguments.card.empty() ? "cpu" : arguments.card);
}

// Plans the run before anything is allocated: refuses one that does not fit, or makes it fit where that is asked for.
void plan_run(training::Config& config, const Arguments& arguments) {
  const auto device = planned_device(arguments);
  if (arguments.unplanned || !device) {
    std::cout << "memory:   not planned\n";
    return;
  }
  const headroom::PlanOptions options{.budget = budget(arguments)};
  headroom::Plan plan = training::plan_training(config, *device, options);
  if (!plan.fits) {
    const auto recommendation = training::recommend(config, *device, options);
    std::cout << headroom::explain(plan) << training::describe(recommendation);
    headroom::require(arguments.fit && recommendation, "headroom.train.memory", "this run needs ",
                      headroom::format_bytes(plan.peak_bytes), " for tensors and ", device->name, " has ",
                      headroom::format_bytes(plan.budget),
                      "; change the configuration, let --fit change it, or give --unplanned");
    config = recommendation->config;
    plan = recommendation->plan;
  }
  std::cout << "memory:   planned peak " << headroom::format_bytes(plan.peak_bytes) << ", headroom "
            << headroom::format_bytes(plan.budget - plan.reserved_bytes) << " on " << device->name << "\n";
}

// Returns the exit code.
int run(const Arguments& arguments) {
  training::Config config = training::load_config(arguments.config);
  const fs::path data = arguments.data.empty() ? fs::path(config.data.path) : arguments.data;
  headroom::require(!data.empty(), "headroom.train.data", "no data: ", arguments.config.string(),
                    " has no data.path; give --data the folder that holds `train`");
  if (arguments.threads > 0) {
    torch::set_num_threads(arguments.threads);
  }
  const torch::Device device = find_device(arguments.device);
  plan_run(config, arguments);
  headroom::MemoryMeter meter(device);  // before the first tensor, so that it sees them all
  if (device.is_cpu()) meter.set_limit(budget(arguments));

  const Split train{training::MusdbDataset(data / "train", dataset_options(config)),
                    static_cast<uint64_t>(config.training.seed)};
  const std::optional<Split> valid = validation_split(data, config);
  const headroom::io::FolderLock lock = open_run_folder(arguments);
  for (const std::string& notice : train.dataset.notices()) std::cout << "data:     " << notice << "\n";
  torch::manual_seed(static_cast<uint64_t>(config.training.seed));
  headroom::models::TimeFrequencyTransformer model(training::model_options(config));
  model->to(device);
  training::Trainer trainer(model, config, train);
  if (!arguments.resume.empty()) {
    const std::string name = arguments.resume.string();
    for (const auto& change : trainer.resume(training::load_state(arguments.resume), name)) {
      std::cout << "resume:   " << training::describe(change) << "\n";
    }
  }
  training::write_atomically(arguments.out / "config.json", {training::to_json(config)});
  print_start(config, model, arguments);

  ProgressBar bar;
  training::RunOptions options{.steps = arguments.steps,
                               .seconds = arguments.seconds,
                               .folder = arguments.out,
                               .on_step =
                                   [&, part = config.training.batch_size](const training::Progress& progress) mutable {
                                     if (progress.microbatch != part) {
                                       bar.close();
                                       std::cout << "memory ran out: from step " << progress.step << " on batches of "
                                                 << config.training.batch_size << " go in parts of "
                                                 << progress.microbatch << std::endl;
                                       part = progress.microbatch;
                                     }
                                     bar.show(progress);
                                   },
                               .stop_requested = [] { return headroom::io::stop_signal() != 0; }};
  if (valid) {
    options.validate = [&] {
      const double nsdr = training::validation_nsdr(model, *valid, config.training.validation_segments);
      bar.close();
      std::cout << "validation nSDR " << nsdr << " dB" << std::endl;
      return nsdr;
    };
  }
  training::Summary summary;
  headroom::io::handle_stop_signals(headroom::io::OnStop::finish_first);  // the step in work, and save
  try {
    summary = trainer.run(options);
  } catch (const std::exception& error) {
    bar.close();
    const auto card = planned_device(arguments);
    if (headroom::is_out_of_memory(error) && card) {
      if (config.training.split_on_out_of_memory) {  // single examples were the last attempt
        config.training.gradient_accumulation_steps *= std::exchange(config.training.batch_size, 1);
      }
      std::cout << training::explain_out_of_memory(config, *card, trainer.peak_bytes());
    }
    if (arguments.memory_summary) std::cout << headroom::memory_summary(meter);
    throw;
  }
  bar.close();
  const std::string last = (arguments.out / "last.pt").string();
  if (summary.stopped) {
    std::cout << "stopped after step " << summary.steps << "; go on with --resume " << last << std::endl;
    return 128 + headroom::io::stop_signal();
  }
  const nlohmann::ordered_json json = {
      {"train_seconds", summary.seconds},
      {"steps", summary.steps},
      {"peak_bytes", summary.peak_bytes},
      {"stored_scores_bytes", headroom::models::stored_scores_bytes(model->options, config.training.batch_size,
                                                                    config.training.segment_length)},
      {"best_metric", summary.best_metric},
      {"best_score", summary.best_score},
      {"losses", summary.epoch_losses}};
  training::write_atomically(arguments.out / "summary.json", {json.dump(2) + "\n"});
  std::cout << summary.steps << " steps, " << clock_time(summary.seconds) << ", peak "
            << headroom::format_bytes(summary.peak_bytes) << ": " << last << std::endl;
  if (arguments.memory_summary) std::cout << headroom::memory_summary(meter);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains a separator on a MUSDB18-HQ folder; writes last.pt, best.pt, config.json and summary.json."};
  Arguments arguments;
  add_path(app, "--config", arguments.config, "configuration, such as examples/configs/musdb18_small.json")->required();
  add_path(app, "--resume", arguments.resume, "checkpoint to go on from, of the same model");
  add_path(app, "--data", arguments.data, "folder with `train` and, optionally, `valid`; default: data.path");
  add_path(app, "--out", arguments.out, "folder for what is written")->capture_default_str();
  app.add_flag("--overwrite", arguments.overwrite, "start anew in a folder that holds another run");
  add_number(app, "--steps", arguments.steps, Bounds<int64_t>{1, 1'000'000'000'000'000},
             "end at this step; default: epochs x steps_per_epoch");
  add_number(app, "--seconds", arguments.seconds, Bounds<double>{1e-3, 1e9},
             "end after this time; the learning rate reaches its end then");
  add_number(app, "--threads", arguments.threads, Bounds<int>{1, 1024}, "CPU threads; default: one a core");
  app.add_option("--card", arguments.card, "device profile to plan for, see plan --help; default: cpu on the CPU");
  app.add_option("--budget", arguments.budget, "what tensors may take, e.g. 8GiB; default: what the card has");
  app.add_flag("--fit", arguments.fit, "apply the smallest change that makes a run fit that does not");
  app.add_flag("--memory-summary", arguments.memory_summary, "end with the allocator's statistics");
  app.add_flag("--unplanned", arguments.unplanned, "start without planning the memory");
  app.add_option("--device", arguments.device, "where the model runs, e.g. cpu or cuda")->capture_default_str();
  return run_tool("train", app, argc, argv, [&] { return run(arguments); });
}
