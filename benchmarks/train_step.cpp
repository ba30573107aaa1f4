// One training step (forward, loss, backward, clipping, AdamW) of whole configurations, without recomputation, beside
// the same step in plain PyTorch (train_step.py), eager and compiled, on the same weights and inputs.

#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>

#include "accelerator.hpp"
#include "headroom/memory.hpp"
#include "headroom/training.hpp"

namespace fs = std::filesystem;
using namespace headroom;

namespace {

/// A folder that goes away with its contents.
struct TemporaryFolder {
  fs::path path = fs::temp_directory_path() / ("headroom_train_step_" + std::to_string(::getpid()));
  TemporaryFolder() { fs::create_directories(path); }
  ~TemporaryFolder() { fs::remove_all(path); }
};

/// Everything that the twin needs, for torch.load.
void write_for_python(const fs::path& path, const training::Config& config, int64_t steps, const std::string& device,
                      const training::TensorMap& model, const training::Example& example) {
  c10::impl::GenericDict content(c10::StringType::get(), c10::AnyType::get());
  content.insert("config", training::to_json(config));
  content.insert("threads", static_cast<int64_t>(torch::get_num_threads()));
  content.insert("steps", steps);
  content.insert("device", device);
  content.insert("model", training::detail::to_dictionary(model));
  content.insert("mixture", example.mixture);
  content.insert("stems", example.stems);
  const std::vector<char> archive = torch::pickle_save(content);
  std::ofstream(path, std::ios::binary).write(archive.data(), static_cast<std::streamsize>(archive.size()));
}

nlohmann::ordered_json run_python(const std::string& python, const std::string& script, const fs::path& folder,
                                  const std::string& mode) {
  const fs::path row = folder / "row.json";
  const auto quoted = [](const std::string& text) { return "'" + text + "'"; };
  const std::string command = quoted(python) + " " + quoted(script) + " " + quoted((folder / "step.pt").string()) +
                              " " + mode + " > " + quoted(row.string());
  require(std::system(command.c_str()) == 0, "headroom.benchmarks.python", "failed: ", command,
          "; expected a Python with torch and the script train_step.py");
  std::ifstream file(row);
  return nlohmann::ordered_json::parse(file);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Seconds and memory of one training step, beside plain PyTorch's", "train_step");
  benchmarks::Report report;
  std::vector<std::string> files = {"examples/configs/demo.json", "examples/configs/musdb18_small.json"};
  std::string python, script = "benchmarks/train_step.py", device = "cpu";
  int64_t steps = 5, segment = 0;
  bool bf16 = false, compiled = false;
  app.add_option("configurations", files, "Configuration files, those with small models first")->capture_default_str();
  app.add_option("--python", python, "Also run the same steps in plain PyTorch with this interpreter");
  app.add_option("--script", script, "The script that it runs")->capture_default_str();
  app.add_option("--steps", steps, "Steps of each; the shortest counts")
      ->check(CLI::Range(2, 1000))
      ->capture_default_str();
  app.add_option("--segment", segment, "Samples of an example, instead of the configuration's")
      ->check(CLI::PositiveNumber);
  app.add_option("--device", device, "Where the steps run; memory is what its allocator peaked at, on the CPU resident")
      ->capture_default_str();
  app.add_flag("--bf16", bf16, "Under bfloat16 autocast");
  app.add_flag("--compiled", compiled, "Also PyTorch with torch.compile");
  return benchmarks::run_benchmark(app, report, argc, argv, [&] {
    if (report.threads > 0) torch::set_num_threads(report.threads);
    report.json = {{"threads", torch::get_num_threads()}, {"rows", nlohmann::json::array()}};
    std::optional<benchmarks::Accelerator> gpu;
    if (device != "cpu") report.json["machine"] = gpu.emplace(device).describe();
    report.json["device"] = device;
    std::printf("%-24s %-10s %10s %14s %12s %12s\n", "", "", "seconds", gpu ? "peak" : "resident", "first loss",
                "last loss");
    for (const std::string& file : files) {
      training::Config config = training::load_config(file);
      config.model.gradient_checkpointing = false;
      config.training.gradient_accumulation_steps = 1;  // as the twin
      config.training.bf16 = bf16;
      if (segment > 0) config.training.segment_length = segment;
      const std::string name = fs::path(file).stem().string();
      const auto add_row = [&](const char* implementation, nlohmann::ordered_json row) {
        std::printf("%-24s %-10s %10.3f %14s %12.6f %12.6f\n", name.c_str(), implementation,
                    row["seconds"].get<double>(), format_bytes(row["memory_bytes"].get<int64_t>()).c_str(),
                    row["loss"].get<double>(), row["last_loss"].get<double>());
        std::fflush(stdout);
        row["configuration"] = name;
        row["implementation"] = implementation;
        row["segment_length"] = config.training.segment_length;
        report.json["rows"].push_back(row);
        return row;
      };

      const TemporaryFolder folder;
      nlohmann::ordered_json ours;
      {
        torch::manual_seed(0);
        const models::Separator model = training::make_model(config);
        const auto stems = static_cast<int64_t>(config.audio.stems.size());
        training::Example example;
        example.stems = 0.1 * torch::randn({config.training.batch_size, stems, config.audio.channels,
                                            config.training.segment_length});  // [B,N,C,S]
        example.mixture = example.stems.sum(1);                                // [B,C,S]
        if (!python.empty()) {
          write_for_python(folder.path / "step.pt", config, steps, device, training::tensors_of(*model), example);
        }
        if (gpu) {
          model->to(gpu->device);
          example = {example.mixture.to(gpu->device), example.stems.to(gpu->device)};
        }
        training::Trainer trainer(model, config, [&](int64_t, int64_t) { return example; });
        double shortest = std::numeric_limits<double>::infinity();
        std::vector<double> losses;
        const auto run_steps = [&] {
          for (int64_t i = 0; i < steps; ++i) {
            const auto start = std::chrono::steady_clock::now();
            losses.push_back(trainer.step(config.training.learning_rate));
            if (gpu) gpu->synchronize();
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            shortest = std::min(shortest, seconds.count());
          }
        };
        int64_t memory = 0;
        if (gpu) {
          memory = gpu->peak_of(run_steps).allocated;
        } else {
          reset_peak_resident_bytes();
          const int64_t before = resident_bytes();
          run_steps();
          memory = peak_resident_bytes() - before;
        }
        ours = add_row(
            "headroom",
            {{"seconds", shortest}, {"memory_bytes", memory}, {"loss", losses.front()}, {"last_loss", losses.back()}});
      }
      if (python.empty()) continue;
      if (gpu) gpu->allocator->emptyCache();  // the twin is another process
      for (const char* mode : {"eager", "compiled"}) {
        if (mode == std::string("compiled") && !compiled) continue;
        const auto theirs = add_row(mode, run_python(python, script, folder.path, mode));
        const auto ratio = [&](const char* key) { return theirs[key].get<double>() / ours[key].get<double>(); };
        std::printf("%-24s %-10s %9.2fx %13.2fx %12.1e %12.1e\n", name.c_str(), "ratio", ratio("seconds"),
                    1 / ratio("memory_bytes"), ratio("loss") - 1, ratio("last_loss") - 1);
      }
    }
  });
}
