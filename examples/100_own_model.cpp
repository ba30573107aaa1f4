// A model of one's own: registered once, it is planned, trained, saved and read by configuration like any other.

#include <headroom/training.hpp>
#include <iostream>

namespace training = headroom::training;

// Filters over the waveform, and their weighted sums: [B,C,S] -> [B,N,C,S]
struct FilterBankImpl : torch::nn::Module {
  FilterBankImpl(int64_t filters, int64_t channels, int64_t stems)
      : analysis(torch::nn::Conv1dOptions(channels, filters, 65).padding(32)),
        synthesis(torch::nn::Conv1dOptions(filters, stems * channels, 65).padding(32)),
        sizes{stems, channels} {
    register_module("analysis", analysis);
    register_module("synthesis", synthesis);
  }
  torch::Tensor forward(const torch::Tensor& mixture) { return synthesis(analysis(mixture)).unflatten(1, sizes); }

  torch::nn::Conv1d analysis, synthesis;
  std::vector<int64_t> sizes;
};
TORCH_MODULE(FilterBank);

// The keys that it has in a configuration
struct FilterBankOptions {
  int64_t filters = 16;
  static void describe(auto& self, auto&& field) {
    field("filters", self.filters, {.at_least = 1, .at_most = 4096, .bound = true}, "of 65 samples each");
  }
};

// Two tones, one low, one high: [B,C,S] and [B,N,C,S]
training::Example tones(int64_t first, int64_t count) {
  const torch::Tensor phase = torch::arange(first, first + count).view({-1, 1, 1, 1});
  const torch::Tensor time = torch::arange(4096.0).to(torch::kFloat), pitch = torch::tensor({0.02f, 0.7f});
  const torch::Tensor stems = torch::sin(phase + time * pitch.view({2, 1, 1})).expand({-1, -1, 2, -1});
  return {stems.sum(1), stems.contiguous()};
}

int main() {
  training::register_model<FilterBankOptions>(
      "filter_bank", {.make = [](const FilterBankOptions& options, const training::Config& config) {
        const auto stems = static_cast<int64_t>(config.audio.stems.size());
        return FilterBank(options.filters, config.audio.channels, stems);
      }});
  const training::Config config = training::parse_config(R"({
    "model": {"type": "filter_bank", "filters": 8},
    "audio": {"stems": ["low", "high"]},
    "training": {"segment_length": 4096, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 10}})",
                                                         "own model");

  std::cout << "planned peak "
            << headroom::format_bytes(training::plan_training(config, headroom::this_machine()).peak_bytes);
  training::Trainer trainer(training::make_model(config), config, tones);
  const training::Summary summary = trainer.run({.steps = 200});
  std::cout << ", loss " << summary.epoch_losses.front() << ", then " << summary.epoch_losses.back() << "\n";
}
