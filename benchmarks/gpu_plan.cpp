// Plan against truth on a GPU: what was planned for training steps, and what the caching allocator and the driver then
// saw; the guide's request for 80.89 GiB as a plan and as a real out-of-memory error; the guide's first
// memory_optimized step, run.

#include <torch/torch.h>

#include <cstdlib>
#include <functional>

#include "accelerator.hpp"
#include "headroom/training.hpp"
#include "noise_source.hpp"

using namespace headroom;
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
  training::Config config;
  if (const size_t slash = name.find('/'); slash != std::string::npos) {
    config = training::load_config(folder + "/musdb18_small.json");
    const int64_t width = std::stoll(name.substr(0, slash));
    config.model.as<models::TimeFrequencyTransformerOptions>()
        .n_fft(2048)
        .hop_length(512)
        .emb_dim(width)
        .n_layers(std::stoll(name.substr(slash + 1)))
        .n_heads(8)
        .ffn_hidden_dim({4 * width});
  } else {
    config = training::load_config(folder + "/musdb18_" + name + ".json");
  }
  config.training.segment_length = static_cast<int64_t>(c.seconds * 44100);
  config.training.batch_size = c.batch;
  config.training.gradient_accumulation_steps = 1;
  config.training.bf16 = c.bf16;
  config.training.optimizer_state = c.optimizer_state;
  config.model.gradient_checkpointing = c.policy;
  return config;
}

/// Two steps of a trainer, as plan_training replays them; the seconds of the second.
double train(const training::Config& config, const benchmarks::Accelerator& gpu) {
  const models::Separator model = training::make_model(config);
  model->to(gpu.device);
  training::Trainer trainer(model, config, benchmarks::NoiseSource{{config}});
  trainer.step(config.training.learning_rate);
  return gpu.seconds_of([&] { trainer.step(config.training.learning_rate); });
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

class Table {
 public:
  Table(const benchmarks::Accelerator& gpu, nlohmann::ordered_json& json, const DeviceProfile& profile)
      : gpu_(gpu), json_(json), profile_(profile) {
    std::printf("%-24s %5s %2s %-15s %-4s | %10s %10s %6s | %10s %10s %6s | %10s %7s\n", "configuration", "s", "B",
                "policy", "", "planned", "allocated", "", "planned", "reserved", "", "driver", "s/step");
  }

  void add(const std::string& name, double music, int64_t batch, const std::string& policy, bool bf16,
           const std::function<Plan(const DeviceProfile&)>& make_plan, const std::function<double()>& run) {
    nlohmann::ordered_json row = {
        {"configuration", name}, {"seconds_of_music", music}, {"batch", batch}, {"policy", policy}, {"bf16", bf16}};
    std::printf("%-24s %5.1f %2ld %-15s %-4s | ", name.c_str(), music, batch, policy.c_str(), bf16 ? "bf16" : "");
    try {
      const Plan planned = make_plan(profile_);
      double seconds = 0;
      const auto real = gpu_.peak_of([&] { seconds = run(); });
      const auto percent = [](int64_t plan, int64_t truth) {
        return 100.0 * (static_cast<double>(plan) / static_cast<double>(truth) - 1);
      };
      row.update({{"planned_peak", planned.peak_bytes},
                  {"allocated_peak", real.allocated},
                  {"planned_reserved", planned.reserved_bytes},
                  {"reserved_peak", real.reserved},
                  {"largest_block", planned.largest_block()->bytes},
                  {"driver_growth", real.used},
                  {"step_seconds", seconds}});
      std::printf("%10s %10s %+5.2f%% | %10s %10s %+5.2f%% | %10s %7.2f\n", format_bytes(planned.peak_bytes).c_str(),
                  format_bytes(real.allocated).c_str(), percent(planned.peak_bytes, real.allocated),
                  format_bytes(planned.reserved_bytes).c_str(), format_bytes(real.reserved).c_str(),
                  percent(planned.reserved_bytes, real.reserved), format_bytes(real.used).c_str(), seconds);
    } catch (const std::exception& error) {
      row["error"] = error.what();
      std::printf("%s\n", std::string(error.what()).substr(0, 300).c_str());
    }
    std::fflush(stdout);
    json_["rows"].push_back(row);
  }

 private:
  const benchmarks::Accelerator& gpu_;
  nlohmann::ordered_json& json_;
  const DeviceProfile& profile_;
};

/// The guide's crash: what LibTorch says when the scores are stored.
std::string guides_crash(const benchmarks::Accelerator& gpu, const std::string& folder) {
  training::Config config = config_of({"memory_optimized_first", 10, 1, "full"}, folder);
  config.model.attention = "reference";
  try {
    const models::Separator model = training::make_model(config);
    model->to(gpu.device);
    model(torch::randn({1, 2, config.training.segment_length}).to(gpu.device));
    return "no error";
  } catch (const std::exception& error) {
    return std::string(is_out_of_memory(error) ? "" : "no out-of-memory error: ") + error.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Plans against what a GPU's allocator and driver see", "gpu_plan");
  benchmarks::Report report;
  std::string device = "cuda", folder = "examples/configs", only;
  bool no_headline = false;
  app.add_option("--device", device, "The GPU")->capture_default_str();
  app.add_option("--configs", folder, "Folder of the guide's configurations")->capture_default_str();
  app.add_option("--only", only, "Only configurations of this name");
  app.add_flag("--no-headline", no_headline, "Leave out the guide's 10 s step");
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    const benchmarks::Accelerator gpu(device);
    const int64_t context = gpu.used_bytes();
    report.json = {{"machine", gpu.describe()}, {"context_bytes", context}, {"rows", nlohmann::json::array()}};
    DeviceProfile profile = device_profile("h100-80gb");
    profile.total_bytes = gpu.total_bytes();

    // Libraries make their handles and workspace with the first products, transforms and attention
    for (const bool bf16 : {false, true}) train(config_of({"small", 0.5, 1, "none", bf16}, folder), gpu);
    train_unet(1, gpu.device);
    gpu.synchronize();
    gpu.allocator->emptyCache();
    const int64_t workspace = gpu.allocator->getDeviceStats(gpu.index).allocated_bytes[0].current;
    const int64_t loaded = gpu.used_bytes() - gpu.allocator->getDeviceStats(gpu.index).reserved_bytes[0].current;
    report.json["workspace_bytes"] = workspace;
    report.json["context_and_libraries_bytes"] = loaded;
    std::printf("%s\ncontext %s, with libraries loaded %s; workspace that stays allocated %s\n",
                report.json["machine"]["card"].get<std::string>().c_str(), format_bytes(context).c_str(),
                format_bytes(loaded).c_str(), format_bytes(workspace).c_str());

    Table table(gpu, report.json, profile);
    for (const Case& c : kCases) {
      if (!only.empty() && only != c.configuration) continue;
      const training::Config config = config_of(c, folder);
      table.add(
          c.configuration, c.seconds, c.batch, c.policy, c.bf16,
          [&](const DeviceProfile& card) { return training::plan_training(config, card); },
          [&] { return train(config, gpu); });
    }
    for (const int64_t batch : {1, 4, 8}) {
      if (!only.empty() && only != "unet") break;
      table.add(
          "unet", 0, batch, "none", false,
          [&](const DeviceProfile& card) { return plan([&] { train_unet(batch, torch::kMeta); }, card); },
          [&] {
            train_unet(batch, gpu.device);
            return 0.0;
          });
    }
    if (no_headline) return;
    const std::string crash = guides_crash(gpu, folder);
    report.json["guides_crash"] = crash;
    std::printf("the guide's step with stored scores: %s\n", crash.substr(0, crash.find('\n')).c_str());
    gpu.allocator->emptyCache();
    for (const bool bf16 : {true, false}) {
      const training::Config config = config_of({"memory_optimized_first", 10, 1, "full", bf16}, folder);
      table.add(
          "memory_optimized_first", 10, 1, "full", bf16,
          [&](const DeviceProfile& card) { return training::plan_training(config, card); },
          [&] { return train(config, gpu); });
    }
  });
}
