#include "steps.hpp"

#include <torch/torch.h>

#include <fstream>

#include "headroom/nn/encoder.hpp"
#include "headroom/plan/plan.hpp"
#include "headroom/training/out_of_memory.hpp"
#include "headroom/training/plan.hpp"
#include "headroom/training/recommend.hpp"
#include "headroom/training/trainer.hpp"
#include "timing.hpp"

namespace headroom::benchmarks {

namespace {

using torch::Tensor;

/// Examples of the shapes that a configuration describes, of noise.
struct NoiseSource {
  training::ShapeSource shapes;
  training::Example operator()(int64_t first, int64_t count) const {
    const auto example = shapes(first, count);
    example.stems.normal_();
    example.mixture.normal_();
    return example;
  }
};

DeviceProfile h100(int64_t total_bytes) {
  DeviceProfile profile = device_profile("h100-80gb");
  profile.total_bytes = total_bytes;
  return profile;
}

Planned figures_of(const Plan& plan) {
  const auto* const largest = plan.largest_block();
  return {plan.peak_bytes, plan.reserved_bytes, largest == nullptr ? 0 : largest->bytes, plan.flops};
}

/// Everything that the twin needs.
void write_for_python(const PythonTwin& twin, const training::Config& config, torch::Device device,
                      const torch::nn::Module& model, const training::Example& example) {
  c10::impl::GenericDict content(c10::StringType::get(), c10::AnyType::get());
  content.insert("config", training::to_json(config));
  content.insert("threads", static_cast<int64_t>(torch::get_num_threads()));
  content.insert("steps", twin.steps);
  content.insert("device", device.str());
  content.insert("model", training::detail::to_dictionary(training::tensors_of(model)));
  content.insert("mixture", example.mixture);
  content.insert("stems", example.stems);
  const std::vector<char> archive = torch::pickle_save(content);
  std::ofstream(twin.file, std::ios::binary).write(archive.data(), static_cast<std::streamsize>(archive.size()));
}

}  // namespace

Planned planned(const std::function<void()>& step) { return figures_of(plan(step, this_machine(), {.value = 1})); }
Planned planned_on_gpu(const std::function<void()>& step, int64_t total_bytes) {
  return figures_of(plan(step, h100(total_bytes)));
}

EncoderStep make_encoder_step(const EncoderSizes& sizes, const std::string& policy, c10::Device device) {
  nn::EncoderOptions options(sizes.dim, sizes.heads, sizes.hidden, sizes.layers);
  if (policy == "reversible") {
    options.reversible(true);
  } else {
    options.gradient_checkpointing(policy);
  }
  nn::Encoder encoder(options);
  if (!device.is_cpu()) encoder->to(device);
  const Tensor x = torch::randn({sizes.batch, sizes.length, sizes.dim}, torch::TensorOptions(device));
  return {encoder.ptr(), x, [encoder, x]() mutable { encoder->forward(x).square().mean().backward(); }};
}

double train(const training::Config& config, int steps, const Accelerator* gpu) {
  const models::Separator model = training::make_model(config);
  if (gpu != nullptr) model->to(gpu->device);
  training::Trainer trainer(model, config, NoiseSource{{config}});
  const auto step = [&] { trainer.step(config.training.learning_rate); };
  double seconds = 0;
  for (int i = 0; i < steps; ++i) seconds = seconds_on(gpu, step);
  return seconds;
}

Planned planned_first_step(const training::Config& config) {
  return planned([&] {
    const models::Separator model = training::make_model(config);
    training::Trainer trainer(model, config, training::ShapeSource{config});
    trainer.step(config.training.learning_rate);
  });
}

Planned planned_training(const training::Config& config, int64_t total_bytes) {
  return figures_of(training::plan_training(config, h100(total_bytes)));
}

training::Config fitted(const training::Config& config, int64_t budget) {
  const auto found = training::recommend(config, this_machine(), {.budget = budget});
  require(found && found->same_training, "headroom.benchmarks.headline", "nothing fits ", format_bytes(budget),
          "; give a larger --budget");
  return found->config;
}

std::string out_of_memory_error(const training::Config& config, c10::Device device) {
  try {
    const models::Separator model = training::make_model(config);
    model->to(device);
    model(torch::randn({1, 2, config.training.segment_length}).to(device));
    return "no error";
  } catch (const std::exception& error) {
    return std::string(is_out_of_memory(error) ? "" : "no out-of-memory error: ") + error.what();
  }
}

namespace {

struct Repeated {
  models::Separator model;
  training::Example example;
};

/// With weights and an example of seed 0, which are written for the twin if there is one.
Repeated make_repeated(const training::Config& config, const PythonTwin& twin, torch::Device device) {
  torch::manual_seed(0);
  models::Separator model = training::make_model(config);
  const auto stems = static_cast<int64_t>(config.audio.stems.size());
  training::Example example;
  example.stems = 0.1 * torch::randn({config.training.batch_size, stems, config.audio.channels,
                                      config.training.segment_length});  // [B,N,C,S]
  example.mixture = example.stems.sum(1);                                // [B,C,S]
  if (!twin.file.empty()) write_for_python(twin, config, device, *model, example);
  model->to(device);
  return {std::move(model), {example.mixture.to(device), example.stems.to(device)}};
}

}  // namespace

std::function<double()> make_repeated_step(const training::Config& config, const PythonTwin& twin,
                                           const Accelerator* gpu) {
  const auto [model, example] = make_repeated(config, twin, gpu != nullptr ? gpu->device : torch::Device(torch::kCPU));
  const auto source = [example = example](int64_t, int64_t) { return example; };
  const auto trainer = std::make_shared<training::Trainer>(model, config, source);
  return [trainer, rate = config.training.learning_rate] { return trainer->step(rate); };
}

std::function<double()> make_repeated_separation(const training::Config& config, const PythonTwin& twin) {
  const auto repeated = make_repeated(config, twin, torch::kCPU);
  repeated.model->eval();
  return [repeated, bf16 = config.training.bf16] {
    const torch::NoGradGuard guard;
    std::optional<headroom::detail::AutocastGuard> autocast;
    if (bf16) autocast.emplace(torch::kCPU, torch::kBFloat16);
    return repeated.model(repeated.example.mixture).abs().mean().item<double>();
  };
}

}  // namespace headroom::benchmarks
