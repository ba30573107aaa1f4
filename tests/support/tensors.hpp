#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <map>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace headroom::testing {

/// Tensors that want a gradient.
inline const auto with_gradient = torch::TensorOptions().requires_grad(true);

/// Normal numbers that depend on the seed alone.
inline torch::Tensor noise(torch::IntArrayRef sizes, int64_t seed = 1, torch::ScalarType type = torch::kDouble) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return torch::randn(sizes, generator, type);
}

inline double largest_difference(const torch::Tensor& a, const torch::Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  return (a - b).abs().max().item<double>();
}

/// Fails unless the same tensors stand in both, bit for bit.
inline void check_equal(const std::vector<torch::Tensor>& actual, const std::vector<torch::Tensor>& expected) {
  REQUIRE(actual.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(torch::equal(actual[i], expected[i]));
  }
}
inline void check_equal(const std::map<std::string, torch::Tensor>& actual,
                        const std::map<std::string, torch::Tensor>& expected) {
  REQUIRE(actual.size() == expected.size());
  for (const auto& [name, tensor] : actual) {
    CAPTURE(name);
    REQUIRE(expected.contains(name));
    CHECK(torch::equal(tensor, expected.at(name)));
  }
}

/// Copies of what training goes on to change.
inline std::map<std::string, torch::Tensor> copies_of(const std::map<std::string, torch::Tensor>& tensors) {
  std::map<std::string, torch::Tensor> copies;
  for (const auto& [name, tensor] : tensors) copies.emplace(name, tensor.detach().clone());
  return copies;
}

}  // namespace headroom::testing
