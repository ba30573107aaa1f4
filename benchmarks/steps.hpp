#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "accelerator.hpp"
#include "headroom/training/config.hpp"

namespace torch::nn {
class Module;
}

// The steps that several benchmarks plan and run. They take the library's largest templates, so one unit compiles them.
namespace headroom::benchmarks {

/// A plan's figures.
struct Planned {
  int64_t peak_bytes = 0, reserved_bytes = 0, largest_block = 0;
  double flops = 0;
};
/// On this machine.
Planned planned(const std::function<void()>& step);
/// On an H100 with so many bytes.
Planned planned_on_gpu(const std::function<void()>& step, int64_t total_bytes);

/// A stack of encoder blocks over tokens [batch, length, dim].
struct EncoderSizes {
  int64_t layers = 12, batch = 2, length = 2049, dim = 192, heads = 12;
  std::vector<int64_t> hidden{768, 768};
};
/// It and its input.
struct EncoderStep {
  std::shared_ptr<torch::nn::Module> encoder;
  at::Tensor x;
  std::function<void()> run;  ///< forward and backward
};
/// The policy "reversible" stands for the reversible stack, which is another model.
EncoderStep make_encoder_step(const EncoderSizes& sizes, const std::string& policy, c10::Device device = c10::kCPU);

/// Trains a new model on noise for some steps, on the GPU if one is given; the seconds of the last step.
double train(const training::Config& config, int steps, const Accelerator* gpu = nullptr);
/// What the first step of that needs here.
Planned planned_first_step(const training::Config& config);
/// What training by a configuration needs on an H100 with so many bytes.
Planned planned_training(const training::Config& config, int64_t total_bytes);
/// The configuration, or the first with the same gradients that fits this machine's budget. Throws
/// headroom.benchmarks.headline where there is none.
training::Config fitted(const training::Config& config, int64_t budget);

/// What is said when a forward pass of the model runs out of memory on a GPU.
std::string out_of_memory_error(const training::Config& config, c10::Device device);

/// What the same steps in Python need.
struct PythonTwin {
  std::string file;  ///< for torch.load; empty: there is no twin
  int64_t steps = 0;
};
/// A step of a trainer that repeats one example, returns its loss. With the weights and the example of seed 0, which
/// are written for the twin if there is one.
std::function<double()> make_repeated_step(const training::Config& config, const PythonTwin& twin,
                                           const Accelerator* gpu = nullptr);
/// A separation of that example by the model, under autocast if the configuration says so; returns the mean magnitude
/// of the stems.
std::function<double()> make_repeated_separation(const training::Config& config, const PythonTwin& twin);

}  // namespace headroom::benchmarks
