// Plan against truth on a GPU: what was planned for training steps, and what the caching allocator and the driver then
// saw; the guide's request for 80.89 GiB as a plan and as a real out-of-memory error; the guide's first
// memory_optimized step, run.

#include <torch/torch.h>

#include <cstdio>

#include "headroom/memory/format.hpp"
#include "steps.hpp"

using namespace headroom;
using benchmarks::Planned;
using torch::Tensor;

namespace {

/// One of the guide's configurations, or a time-frequency transformer of the sizes in which RoFormers are published,
/// cut to a length and batch that fit.
struct Case {
  const char* configuration;
  double seconds;  ///< of music
  int64_t batch;
  const char* policy;
  bool bf16 = false;
  const char* optimizer_state = "full";
};

const std::vector<Case> kCases = {
    {"small", 3, 1, "none"},
    {"small", 3, 1, "full"},
    {"small", 3, 1, "selective"},
    {"small", 3, 1, "tiled"},
    {"small", 3, 1, "tiled+offload"},
    {"small", 3, 4, "none", true},
    {"small", 3, 4, "full", true},
    {"small", 1, 8, "none"},
    {"ultra_safe", 2, 2, "full"},
    {"ultra_safe", 2, 2, "none", true},
    {"ultra_safe", 1, 8, "nested", true},
    {"memory_optimized", 1, 1, "none"},
    {"memory_optimized", 1, 1, "selective"},
    {"memory_optimized", 1, 1, "full"},
    {"memory_optimized", 1, 1, "tiled+offload"},
    {"memory_optimized", 1, 2, "none", true},
    {"memory_optimized", 1, 4, "full+offload", true},
    {"memory_optimized_first", 1, 1, "none"},
    {"memory_optimized_first", 1, 1, "8*full,none"},
    {"memory_optimized_first", 1, 1, "every-2", true},
    {"memory_optimized_first", 1, 2, "full", true, "8bit"},
    {"xlarge", 0.5, 1, "none", true},
    {"xlarge", 0.5, 1, "full"},
    {"xlarge", 0.5, 2, "full", true, "bf16"},
    {"128/6", 2, 1, "none"},
    {"128/6", 2, 4, "full"},
    {"128/6", 2, 8, "none", true},
    {"256/8", 2, 1, "none"},
    {"256/8", 2, 2, "selective", true},
    {"384/12", 1, 1, "none"},
    {"384/12", 1, 2, "none", true},
    {"384/12", 2, 2, "full+offload", true},
};

training::Config config_of(const Case& c, const std::string& folder) {
  const std::string name = c.configuration;
  const size_t slash = name.find('/');
  const bool published = slash != std::string::npos;
  training::Config config = training::load_config(folder + "/musdb18_" + (published ? "small" : name) + ".json");
  if (published) {
    const int64_t width = std::stoll(name.substr(0, slash));
    config.model.as<models::TimeFrequencyTransformerOptions>()
        .n_fft(2048)
        .hop_length(512)
        .emb_dim(width)
        .n_layers(std::stoll(name.substr(slash + 1)))
        .n_heads(8)
        .ffn_hidden_dim({4 * width});
  }
  config.training.segment_length = static_cast<int64_t>(c.seconds * 44100);
  config.training.batch_size = c.batch;
  config.training.gradient_accumulation_steps = 1;
  config.training.bf16 = c.bf16;
  config.training.optimizer_state = c.optimizer_state;
  config.model.gradient_checkpointing = c.policy;
  return config;
}

/// What convolutions do to a plan: a U-Net with batch norm over spectrograms.
struct UNet : torch::nn::Module {
  UNet(int64_t width, int64_t depth) {
    namespace nn = torch::nn;
    int64_t channels = 2;
    for (int64_t i = 0; i < depth; ++i, channels = width << (i - 1)) {
      const int64_t out = width << i;
      down.push_back(
          register_module("down" + std::to_string(i),
                          nn::Sequential(nn::Conv2d(nn::Conv2dOptions(channels, out, 5).stride(2).padding(2)),
                                         nn::BatchNorm2d(out), nn::ReLU())));
      const int64_t back = i == 0 ? 2 : width << (i - 1);
      up.push_back(register_module(
          "up" + std::to_string(i),
          nn::Sequential(nn::ConvTranspose2d(nn::ConvTranspose2dOptions(i + 1 == depth ? out : 2 * out, back, 5)
                                                 .stride(2)
                                                 .padding(2)
                                                 .output_padding(1)))));
    }
  }
  Tensor forward(const Tensor& x) {
    std::vector<Tensor> levels{x};
    for (auto& layer : down) levels.push_back(layer->forward(levels.back()));
    Tensor y = up.back()->forward(levels.back());
    for (size_t i = up.size() - 1; i-- > 0;) y = up[i]->forward(torch::cat({torch::relu(y), levels[i + 1]}, 1));
    return y;
  }
  std::vector<torch::nn::Sequential> down, up;
};

void train_unet(int64_t batch, torch::Device device) {
  UNet net(16, 5);
  if (!device.is_meta()) net.to(device);  // in a dry run it is there
  torch::optim::AdamW optimizer(net.parameters());
  const Tensor x = torch::randn({batch, 2, 1024, 256}, torch::TensorOptions(device));
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    (net.forward(x) - x).abs().mean().backward();
    optimizer.step();
  }
}

/// Plans steps for the card, runs them on it, and prints and keeps both.
class Table {
 public:
  Table(const benchmarks::Accelerator& gpu, benchmarks::Benchmark& benchmark, std::string folder)
      : gpu_(gpu), benchmark_(benchmark), folder_(std::move(folder)) {
    std::printf("%-24s %5s %2s %-15s %-4s | %10s %10s %6s | %10s %10s %6s | %10s %7s\n", "configuration", "s", "B",
                "policy", "", "planned", "allocated", "", "planned", "reserved", "", "driver", "s/step");
  }

  /// Two steps of a trainer, as plan_training replays them; the seconds are those of the second.
  void add(const Case& c) {
    const training::Config config = config_of(c, folder_);
    add(c, benchmarks::planned_training(config, gpu_.total_bytes()),
        [&] { return benchmarks::train(config, 2, &gpu_); });
  }
  void add_unet(int64_t batch) {
    add({"unet", 0, batch, "none"},
        benchmarks::planned_on_gpu([&] { train_unet(batch, torch::kMeta); }, gpu_.total_bytes()), [&] {
          train_unet(batch, gpu_.device);
          return 0.0;
        });
  }

 private:
  void add(const Case& c, const Planned& planned, const std::function<double()>& run) {
    benchmarks::Row row = {{"configuration", c.configuration},
                           {"seconds_of_music", c.seconds},
                           {"batch", c.batch},
                           {"policy", c.policy},
                           {"bf16", c.bf16}};
    std::printf("%-24s %5.1f %2ld %-15s %-4s | ", c.configuration, c.seconds, c.batch, c.policy, c.bf16 ? "bf16" : "");
    try {
      double seconds = 0;
      const auto real = gpu_.peak_of([&] { seconds = run(); });
      const auto percent = [](int64_t plan, int64_t truth) {
        return 100.0 * (static_cast<double>(plan) / static_cast<double>(truth) - 1);
      };
      row.insert(row.end(), {{"planned_peak", planned.peak_bytes},
                             {"allocated_peak", real.allocated},
                             {"planned_reserved", planned.reserved_bytes},
                             {"reserved_peak", real.reserved},
                             {"largest_block", planned.largest_block},
                             {"driver_growth", real.used},
                             {"step_seconds", seconds}});
      std::printf("%10s %10s %+5.2f%% | %10s %10s %+5.2f%% | %10s %7.2f\n", format_bytes(planned.peak_bytes).c_str(),
                  format_bytes(real.allocated).c_str(), percent(planned.peak_bytes, real.allocated),
                  format_bytes(planned.reserved_bytes).c_str(), format_bytes(real.reserved).c_str(),
                  percent(planned.reserved_bytes, real.reserved), format_bytes(real.used).c_str(), seconds);
    } catch (const std::exception& error) {
      row.emplace_back("error", error.what());
      std::printf("%s\n", std::string(error.what()).substr(0, 300).c_str());
    }
    std::fflush(stdout);
    benchmark_.add_row(row);
  }

  const benchmarks::Accelerator& gpu_;
  benchmarks::Benchmark& benchmark_;
  std::string folder_;
};

/// Makes libraries load, and set up the handles and the workspace that they do with the first products, transforms and
/// attention. Notes what that took beside the `context`.
void load_libraries(const benchmarks::Accelerator& gpu, benchmarks::Benchmark& benchmark, const std::string& folder) {
  const int64_t context = gpu.used_bytes();
  for (const bool bf16 : {false, true}) {
    benchmarks::train(config_of({"small", 0.5, 1, "none", bf16}, folder), 2, &gpu);
  }
  train_unet(1, gpu.device);
  gpu.synchronize();
  gpu.allocator->emptyCache();
  const auto stats = gpu.allocator->getDeviceStats(gpu.index);
  const int64_t workspace = stats.allocated_bytes[0].current;
  const int64_t loaded = gpu.used_bytes() - stats.reserved_bytes[0].current;
  benchmark.note("context_bytes", context);
  benchmark.note("workspace_bytes", workspace);
  benchmark.note("context_and_libraries_bytes", loaded);
  std::printf("context %s, with libraries loaded %s; workspace that stays allocated %s\n",
              format_bytes(context).c_str(), format_bytes(loaded).c_str(), format_bytes(workspace).c_str());
}

/// The guide's crash: what LibTorch says when the scores are stored.
std::string guides_crash(const benchmarks::Accelerator& gpu, const std::string& folder) {
  training::Config config = config_of({"memory_optimized_first", 10, 1, "full"}, folder);
  config.model.attention = "reference";
  return benchmarks::out_of_memory_error(config, gpu.device);
}

}  // namespace

int main(int argc, char** argv) {
  benchmarks::Benchmark benchmark("gpu_plan", "Plans against what a GPU's allocator and driver see");
  std::string device = "cuda", folder = "examples/configs", only;
  bool no_headline = false;
  benchmark.add({.name = "--device", .help = "The GPU", .target = &device});
  benchmark.add({.name = "--configs", .help = "Folder of the guide's configurations", .target = &folder});
  benchmark.add({.name = "--only", .help = "Only configurations of this name", .target = &only});
  benchmark.add({.name = "--no-headline", .help = "Leave out the guide's 10 s step", .target = &no_headline});
  return benchmark.run(argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    const benchmarks::Row machine = gpu.describe();
    benchmark.note("machine", machine);
    std::printf("%s\n", std::get<std::string>(machine[0].second).c_str());
    load_libraries(gpu, benchmark, folder);

    Table table(gpu, benchmark, folder);
    for (const Case& c : kCases) {
      if (only.empty() || only == c.configuration) table.add(c);
    }
    for (const int64_t batch : {1, 4, 8}) {
      if (only.empty() || only == "unet") table.add_unet(batch);
    }
    if (no_headline) return;
    const std::string crash = guides_crash(gpu, folder);
    benchmark.note("guides_crash", crash);
    std::printf("the guide's step with stored scores: %s\n", crash.substr(0, crash.find('\n')).c_str());
    gpu.allocator->emptyCache();
    for (const bool bf16 : {true, false}) table.add({"memory_optimized_first", 10, 1, "full", bf16});
  });
}
