#pragma once

#include <torch/optim/adamw.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "headroom/optim/adamw.hpp"

namespace headroom::inline v0::optim {

/// RAdam (Liu et al. 2020, arXiv:1908.03265) with decoupled weight decay, as torch.optim.RAdam of Python with
/// decoupled_weight_decay=True: AdamW that goes by the first moment alone as long as the second one comes of too few
/// gradients, and then by both, at first more slowly. Options, formats and bytes are those of AdamW.
class RAdam : public AdamW {
 public:
  using AdamW::AdamW;

  std::string name() const override { return "RAdam"; }

 protected:
  Pace pace_at(const torch::optim::AdamWOptions& options, int64_t step) const override {
    const auto [first, second] = options.betas();
    const double power = std::pow(second, step), longest = 2 / (1 - second) - 1;
    // Gradients that the second moment is an average of, about
    const double length = longest - 2 * static_cast<double>(step) * power / (1 - power);
    const double rate = options.lr() / (1 - std::pow(first, step));
    if (length <= 5) return {rate, 1, false};
    const double rectification =
        std::sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length));
    return {rate * rectification * std::sqrt(1 - power), 1};
  }
};

}  // namespace headroom::inline v0::optim
