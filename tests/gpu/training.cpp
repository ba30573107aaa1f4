#include "headroom/training.hpp"

#include <filesystem>
#include <string>
#include <vector>

#include "gpu/device.hpp"
#include "gpu/synchronizations.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/models.hpp"
#include "support/files.hpp"
#include "support/tiny_separator.hpp"
#include "support/transformer_options.hpp"

using namespace headroom;
using namespace headroom::testing;
using torch::Tensor;

namespace {

training::Config small_config() {
  return training::parse_config(R"({
    "model": {"n_fft": 256, "hop_length": 64, "n_layers": 2, "emb_dim": 32, "n_heads": 2, "ffn_hidden_dim": [64],
              "gradient_checkpointing": "1*full,none"},
    "training": {"segment_length": 2048, "batch_size": 2, "steps_per_epoch": 10, "epochs": 5, "learning_rate": 0.002,
                 "warmup_steps": 5},
    "loss": {"windows": [256, 128], "hop": 64, "min_n_fft": 256}})",
                                "test");
}

training::Example source(int64_t first, int64_t count) { return noise_examples(first % 6, count, 2048); }

models::TimeFrequencyTransformer make_transformer(const training::Config& config) {
  torch::manual_seed(51);
  models::TimeFrequencyTransformer model(training::model_options(config));
  model->to(test_device());
  return model;
}

auto make_trainer(const models::TimeFrequencyTransformer& model, const training::Config& config) {
  return training::Trainer(model, config, source);
}

std::vector<Tensor> step_values(models::TimeFrequencyTransformer& model, const training::Config& config,
                                torch::Device device, torch::ScalarType dtype) {
  model->to(device, dtype);
  model->zero_grad();
  const training::Example example = source(0, 2);
  const Tensor estimate = model->forward(example.mixture.to(device, dtype));
  training::make_loss(config)->forward(estimate, example.stems.to(device, dtype)).backward();
  std::vector<Tensor> values{estimate.detach().cpu().to(torch::kDouble)};
  for (const Tensor& p : model->parameters()) values.push_back(p.grad().cpu().to(torch::kDouble).clone());
  return values;
}

}  // namespace

TEST_CASE("the model on the device: output and every gradient against double on the CPU", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const training::Config config = small_config();
  models::TimeFrequencyTransformer model = make_transformer(config);
  const auto ours = step_values(model, config, test_device(), torch::kFloat);
  const auto naive = step_values(model, config, torch::kCPU, torch::kFloat);
  const auto exact = step_values(model, config, torch::kCPU, torch::kDouble);
  const auto rms = [](const Tensor& x) { return x.square().mean().sqrt().item<double>(); };
  for (size_t i = 0; i < exact.size(); ++i) {
    CAPTURE(i);
    CHECK(rms(ours[i] - exact[i]) <= 2 * rms(naive[i] - exact[i]) + 1e-6 * rms(exact[i]));
  }
}

TEST_CASE("50 steps on the device lower the loss; stopped, saved and resumed they end with the same bits", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const Deterministic deterministic(/*warn_only=*/true);  // the STFT's padding has no such kernel
  const training::Config config = small_config();
  const TemporaryFolder folder;
  models::TimeFrequencyTransformer whole = make_transformer(config);
  auto trainer = make_trainer(whole, config);
  const training::Summary summary = trainer.run({.steps = 50});
  CHECK(summary.steps == 50);
  CHECK(summary.epoch_losses.back() < 0.97 * summary.epoch_losses.front());

  models::TimeFrequencyTransformer first = make_transformer(config);
  int64_t now = 0;
  make_trainer(first, config)
      .run({.steps = 50,
            .folder = folder.path(),
            .on_step = [&](const training::StepReport& p) { now = p.step; },
            .stop_requested = [&] { return now == 23; }});
  torch::manual_seed(99);
  models::TimeFrequencyTransformer second = make_transformer(config);
  auto resumed = make_trainer(second, config);
  resumed.resume(training::load_state(folder / "last.pt"), "last.pt");
  CHECK(resumed.run({.steps = 50}).epoch_losses == summary.epoch_losses);
  const auto expected = whole->parameters(), actual = second->parameters();
  for (size_t i = 0; i < expected.size(); ++i) CHECK(actual[i].equal(expected[i]));
}

TEST_CASE("bfloat16 autocast, narrow optimizer states and offload train on the device", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  for (const char* state : {"bf16", "8bit"}) {
    training::Config config = small_config();
    config.training.bf16 = true;
    config.training.optimizer_state = state;
    config.model.gradient_checkpointing = "full+offload";
    models::TimeFrequencyTransformer model = make_transformer(config);
    auto trainer = make_trainer(model, config);
    const training::Summary summary = trainer.run({.steps = 30});
    CHECK(summary.epoch_losses.back() < 0.99 * summary.epoch_losses.front());
  }
}

TEST_CASE("separating on the device gives what separating on the CPU gives", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const training::Config config = small_config();
  models::TimeFrequencyTransformer model = make_transformer(config);
  audio::SeparatorOptions options;
  options.segments.length = 2048, options.channels = 2, options.stems = 4, options.device = test_device();
  const Tensor mixture = 0.1 * torch::randn({2, 9000});
  const Tensor there = audio::separate(mixture, model, options);
  model->to(torch::kCPU);
  options.device = torch::kCPU;
  const Tensor here = audio::separate(mixture, model, options);
  CHECK((there - here).abs().max().item<double>() < 1e-5);
}

TEST_CASE("a plan of training for the device is what its allocator then sees", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  auto& allocator = *dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(test_device().type()));
  for (const char* policy : {"none", "full", "selective", "tiled"}) {
    CAPTURE(policy);
    training::Config config = small_config();
    transformer(config).n_fft(4096).hop_length(1024).emb_dim(96).n_heads(6).ffn_hidden_dim({384, 384});
    config.model.gradient_checkpointing = policy;
    config.training.segment_length = 132300, config.training.batch_size = 1;
    const auto train = [&] {
      models::TimeFrequencyTransformer model = make_transformer(config);
      const auto examples = [&](int64_t first, int64_t count) { return noise_examples(first, count, 132300); };
      training::Trainer trainer(model, config, examples);
      for (int step = 0; step < 2; ++step) trainer.step(1e-3);
      synchronize();
    };
    train();  // libraries make their workspace
    allocator.emptyCache();
    const int64_t measured = MemoryMeter(test_device()).measure(train).added_peak();
    const int64_t planned = training::plan_training(config, device_profile("h200-141gb")).peak_bytes;
    CHECK(static_cast<double>(planned) == Approx(static_cast<double>(measured)).epsilon(0.02));
  }
}

TEST_CASE("a training step on the device waits for it no more often than it reads numbers", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  training::Config config = small_config();
  config.model.gradient_checkpointing = "full+offload";
  models::TimeFrequencyTransformer model = make_transformer(config);
  audio::SeparationLoss loss = training::make_loss(config);
  const training::Example example = source(0, 2);
  const Tensor mixture = example.mixture.to(test_device()), stems = example.stems.to(test_device());
  const auto pass = [&] { loss->forward(model->forward(mixture), stems).backward(); };
  for (int i = 0; i < 3; ++i) pass();
  synchronize();
  const int64_t before = synchronizations();
  pass();
  // offload lets two tensors leave at a time and waits for the one before: four blocks, and what is kept of the first
  CHECK(synchronizations() - before <= 3);

  config.model.gradient_checkpointing = "none";
  models::TimeFrequencyTransformer plain = make_transformer(config);
  const auto plain_pass = [&] { loss->forward(plain->forward(mixture), stems).backward(); };
  for (int i = 0; i < 3; ++i) plain_pass();
  synchronize();
  const int64_t at_rest = synchronizations();
  plain_pass();
  CHECK(synchronizations() - at_rest <= 1);
  auto trainer = make_trainer(plain, config);
  for (int i = 0; i < 3; ++i) trainer.step(1e-3);
  synchronize();
  const int64_t start = synchronizations();
  trainer.step(1e-3);
  // that one, the loss, the gradient norm, and two tensors of an example that come from memory that is not pinned
  CHECK(synchronizations() - start <= 5);
}
