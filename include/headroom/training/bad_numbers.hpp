#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/core/finite.hpp"
#include "headroom/training/example.hpp"

namespace headroom::inline v0::training {

/// A loss or a gradient that is not finite.
struct BadNumber {
  std::string what;                        ///< "loss" or "gradient norm"
  double value = 0;                        ///< NaN or infinite
  int64_t first = 0, count = 0;            ///< examples of the passes that it comes from
  std::vector<std::string> culprits = {};  ///< what else is not finite, such as "the gradient of embed.weight"
  std::vector<int64_t> bad_examples = {};  ///< those that are not finite, or whose estimates are not
};

namespace detail {

inline bool all_finite(const torch::Tensor& x) { return torch::isfinite(x).all().item<bool>(); }

/// Appends each parameter, or each gradient, that is not finite.
inline void add_culprits(BadNumber& bad, const torch::nn::Module& model, bool gradients) {
  for (const auto& parameter : model.named_parameters()) {
    const torch::Tensor& values = gradients ? parameter.value().grad() : parameter.value();
    if (values.defined() && !all_finite(values)) {
      bad.culprits.push_back((gradients ? "the gradient of " : "the parameter ") + parameter.key());
    }
  }
}

}  // namespace detail

/// A loss of examples first, first + 1, …, their batch and its estimate [B,N,C,S]: looks for parameters and examples
/// that are not finite.
inline BadNumber bad_loss(const torch::nn::Module& model, double value, int64_t first, const Example& batch,
                          const torch::Tensor& estimate) {
  BadNumber bad{.what = "loss", .value = value, .first = first, .count = batch.mixture.size(0)};
  detail::add_culprits(bad, model, false);
  for (int64_t i = 0; i < bad.count; ++i) {
    const auto look = [&](const char* what, const torch::Tensor& values) {
      if (detail::all_finite(values[i])) return;
      bad.culprits.push_back(what + std::string(" of example ") + std::to_string(first + i));
      if (bad.bad_examples.empty() || bad.bad_examples.back() != first + i) bad.bad_examples.push_back(first + i);
    };
    look("the mixture", batch.mixture);
    look("the stems", batch.stems);
    look("the estimate", estimate);
  }
  return bad;
}

/// The gradients of examples first, …, first + count - 1: looks for those that are not finite.
inline BadNumber bad_gradients(const torch::nn::Module& model, double norm, int64_t first, int64_t count) {
  BadNumber bad{.what = "gradient norm", .value = norm, .first = first, .count = count};
  detail::add_culprits(bad, model, true);
  return bad;
}

/// In words: what, at which step, of which examples, and where the bad ones, or all, come from if `origin` can tell.
inline std::string describe(const BadNumber& bad, int64_t step, const std::function<std::string(int64_t)>& origin) {
  constexpr std::size_t kMost = 8;
  std::ostringstream text;
  const bool infinite = bad.value > 0 || bad.value < 0;  // a NaN is printed with the sign that it has
  text << "the " << bad.what << " is " << (infinite ? bad.value : std::numeric_limits<double>::quiet_NaN())
       << " at step " << step << ", examples " << bad.first << " to " << bad.first + bad.count - 1;
  const auto list = [&](const char* title, std::size_t count, auto&& item) {
    for (std::size_t i = 0; i < std::min(kMost, count); ++i) text << (i == 0 ? title : ", ") << item(i);
    if (count > kMost) text << " and " << count - kMost << " more";
  };
  list("; not finite: ", bad.culprits.size(), [&](std::size_t i) { return bad.culprits[i]; });
  if (!origin) return text.str();
  std::vector<int64_t> examples = bad.bad_examples;
  for (int64_t i = 0; bad.bad_examples.empty() && i < bad.count; ++i) examples.push_back(bad.first + i);
  list("; example ", examples.size(),
       [&](std::size_t i) { return std::to_string(examples[i]) + ": " + origin(examples[i]); });
  return text.str();
}

/// Scales all gradients so that their norm together is at most `limit`, if that is above 0, and returns the norm of
/// before: as torch::nn::utils::clip_grad_norm_, bit for bit. Where it is not finite nothing is scaled.
inline double clip_gradients(const std::vector<torch::Tensor>& parameters, double limit) {
  std::vector<torch::Tensor> gradients, norms;
  for (const torch::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) gradients.push_back(parameter.grad());
  }
  if (gradients.empty()) return 0;
  for (const torch::Tensor& gradient : gradients) norms.push_back(gradient.norm());
  const torch::Tensor norm = norms.size() == 1 ? norms[0] : torch::stack(norms).norm();
  const double value = norm.item<double>();
  if (limit <= 0 || !core::detail::is_finite(value)) return value;
  const torch::Tensor factor = (limit / (norm + 1e-6)).clamp_max(1.0);
  for (const torch::Tensor& gradient : gradients) gradient.mul_(factor);
  return value;
}

}  // namespace headroom::inline v0::training
