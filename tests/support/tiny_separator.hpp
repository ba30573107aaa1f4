#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "headroom/training/example.hpp"

namespace headroom::testing {

/// A separator small enough for tests, with what trainers stumble over: biases, a norm, a buffer, dropout.
class TinySeparatorImpl : public torch::nn::Cloneable<TinySeparatorImpl> {
 public:
  explicit TinySeparatorImpl(int64_t width = 6, double dropout = 0.2) : width_(width), dropout_(dropout) { reset(); }

  void reset() override {
    first = register_module("first", torch::nn::Conv1d(torch::nn::Conv1dOptions(2, width_, 9).padding(4)));
    norm = register_module("norm", torch::nn::GroupNorm(1, width_));
    dropout = register_module("dropout", torch::nn::Dropout(dropout_));
    last = register_module("last", torch::nn::Conv1d(width_, 8, 1));
    scale = register_buffer("scale", torch::ones({1}));
  }

  /// [B,2,S] -> [B,4,2,S]
  torch::Tensor forward(const torch::Tensor& mixture) {
    return (last(dropout(norm(first(mixture)))) * scale).unflatten(1, {4, 2});
  }

  torch::nn::Conv1d first{nullptr}, last{nullptr};
  torch::nn::GroupNorm norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
  torch::Tensor scale;

 private:
  int64_t width_;
  double dropout_;
};
TORCH_MODULE(TinySeparator);

/// Example i is noise drawn with seed i: four stems of different loudness and their sum.
inline training::Example noise_examples(int64_t first, int64_t count, int64_t samples = 512) {
  std::vector<torch::Tensor> stems;
  for (int64_t i = first; i < first + count; ++i) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(i));
    stems.push_back(torch::randn({4, 2, samples}, generator) * torch::tensor({1.0, 0.5, 0.25, 2.0}).view({4, 1, 1}));
  }
  const torch::Tensor all = torch::stack(stems);
  return {all.sum(1), all};
}

}  // namespace headroom::testing
