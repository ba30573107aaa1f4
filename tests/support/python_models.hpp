#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "headroom/weights/load.hpp"
#include "headroom/weights/tensors.hpp"
#include "support/catch.hpp"

namespace headroom::testing {

/// What a model computes for a mixture, a number from 0, in a data type: its output, loss and gradients by the names of
/// a file that tests/models/hashed.py wrote.
using ModelResults = std::function<std::map<std::string, torch::Tensor>(uint32_t mixture, torch::Dtype dtype)>;

/// Checks that a model computes in double what a Python model does, and is as exact in float. The file has values for
/// the first mixture and the errors of the Python model in float for each. How far rounding goes is a matter of luck:
/// some mixtures enlarge it a hundred times, for one side or for both. So the ratios of the errors are compared over
/// all mixtures by their geometric mean, which is 1 for equals: to within 1.25 for the whole model, and 4 for a tensor,
/// which may have one number.
inline void check_against_python(const std::string& file, const ModelResults& results) {
  constexpr int64_t mixtures = 8;
  const weights::TensorMap reference = weights::load_tensors(file);
  const auto rms = [](const torch::Tensor& x) { return x.square().mean().sqrt(); };
  const auto theirs = [&](const std::string& name) { return reference.at(name).slice(0, -mixtures); };  // errors
  std::map<std::string, std::vector<torch::Tensor>> errors;
  for (uint32_t mixture = 0; mixture < mixtures; ++mixture) {
    const auto exact = results(mixture, torch::kDouble), inexact = results(mixture, torch::kFloat);
    REQUIRE(exact.size() == reference.size());
    for (const auto& [name, x] : exact) {
      INFO(file << ": " << name);
      REQUIRE(reference.contains(name));
      errors[name].push_back(rms(inexact.at(name) - x));
      if (mixture > 0) continue;
      const torch::Tensor values = reference.at(name).slice(0, 0, -mixtures);
      REQUIRE(values.numel() == x.numel());
      CHECK((rms(x.flatten() - values) / theirs(name).max()).item<double>() <= 1e-6);
    }
  }
  std::vector<torch::Tensor> ratios;
  for (const auto& [name, ours] : errors) {
    INFO(file << ": " << name);
    const torch::Tensor nothing = 0.1 * theirs(name).mean();  // one number may by chance be without an error
    ratios.push_back(((torch::stack(ours) + nothing) / (theirs(name) + nothing)).log());
    CHECK(ratios.back().mean().exp().item<double>() <= 4);
  }
  INFO(file);
  CHECK(torch::cat(ratios).mean().exp().item<double>() <= 1.25);
}

}  // namespace headroom::testing
