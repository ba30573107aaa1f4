#pragma once

#include <torch/torch.h>

#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/plan/plan.hpp"

namespace headroom::testing {

using Tensors = std::vector<torch::Tensor>;

/// An operator on some inputs. Those of floating point get gradients.
struct OperatorCase {
  std::string name;
  std::vector<std::vector<int64_t>> shapes;
  std::function<torch::Tensor(const Tensors&)> run;
  torch::ScalarType dtype = torch::kFloat;
  bool at_most = false;  ///< the dry run may need more: LibTorch avoids in-place sums in the backward pass there
};

/// What an operator returns, what its gradients look like, and what both take at most.
struct Seen {
  std::vector<std::string> tensors;
  int64_t peak = 0;
};

inline std::string looks_of(const torch::Tensor& x) {
  std::ostringstream text;
  if (!x.defined()) return "undefined";
  text << x.scalar_type() << " " << x.sizes() << " strides " << x.strides();
  return text.str();
}

inline Seen see(const OperatorCase& c, MemoryMeter& meter) {
  Seen seen;
  Tensors inputs;
  for (const auto& shape : c.shapes) inputs.push_back(torch::rand(shape, c.dtype).requires_grad_());
  meter.reset_peak();
  const int64_t before = meter.live();
  const torch::Tensor y = c.run(inputs);
  seen.tensors.push_back(looks_of(y));
  if (y.requires_grad()) {
    const torch::Tensor grad = torch::ones_like(y);
    for (const torch::Tensor& g : torch::autograd::grad({y}, inputs, {grad}, {}, false, true)) {
      seen.tensors.push_back(looks_of(g));
    }
  }
  seen.peak = meter.peak() - before;
  return seen;
}

/// The same in a dry run.
inline Seen see_dry(const OperatorCase& c, torch::Device device = torch::kCPU) {
  Seen dry;
  detail::dry_trace(
      [&] {
        MemoryMeter meter(torch::kMeta);
        dry = see(c, meter);
      },
      device);
  return dry;
}

}  // namespace headroom::testing
