#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/types.h>

#include <cstdint>
#include <utility>

#include "headroom/models/roformer/parts.hpp"

// Value residuals (Zhou et al. 2024, arXiv:2410.17897): attention along an axis mixes the values of the first block
// along that axis into its own.
namespace headroom::inline v0::models {

/// What a block does about values: its own are v, those of the first block r, and it has gates m.
enum class ValueResidual {
  none,        ///< nothing
  gives,       ///< it is the first block
  mixes,       ///< v + m·(r - v)
  transposes,  ///< v + r·(m - v): attention of Mel-Band RoFormers in bs-roformer 1.2.4 has m and r in this order
};

/// The values of the first block along an axis, [..., H, D], in one forward pass.
class FirstValues {
 public:
  /// A recomputation gives them again; the first ones stay.
  void give(const torch::Tensor& values) {
    if (!values_.defined()) values_ = values;
  }
  const torch::Tensor& get() const { return values_; }
  /// Ends the forward pass. Recomputations need the numbers alone, and a graph must not hold itself through them.
  void leave_graph() {
    if (values_.defined()) values_ = values_.detach().set_requires_grad(values_.requires_grad());
  }

 private:
  torch::Tensor values_;
};

/// The part of an attention layer that mixes values: a gate for each head, a linear layer of the tokens' norm. In files
/// it is to_value_residual_mix, or learned_value_residual_mix.0 with Mel-Band RoFormers.
class ValueMix {
 public:
  ValueMix() = default;
  /// Registers the gates, where there are any, in `attention`.
  ValueMix(torch::nn::Module& attention, ValueResidual kind, int64_t dim, int64_t heads, bool of_mel) : kind_(kind) {
    if (kind == ValueResidual::none || kind == ValueResidual::gives) return;
    gates_ = nn::Linear(dim, heads);
    if (of_mel) {
      attention.register_module("learned_value_residual_mix", torch::nn::ModuleList(gates_));
    } else {
      attention.register_module("to_value_residual_mix", gates_);
    }
  }

  bool changes() const { return !gates_.is_empty(); }

  /// The values that attention takes instead of its own, `values` [..., H, D]: of tokens x [..., dim] before `norm`.
  /// Where gradients are computed its own are kept in a copy, and may be written over; else this does so.
  torch::Tensor forward(const torch::Tensor& values, const torch::Tensor& x, const nn::RMSNorm& norm,
                        FirstValues* first) const {
    if (kind_ == ValueResidual::none) return values;
    if (kind_ == ValueResidual::gives) {
      first->give(values.clone());  // without what lies beside them
      return values;
    }
    auto chain = detail::normed(x, norm);
    detail::append(chain, gates_);
    const torch::Tensor gates = nn::detail::run(std::move(chain)).sigmoid().unsqueeze(-1);  // [...,H,1]
    const auto [to, by] =
        kind_ == ValueResidual::mixes ? std::pair(first->get(), gates) : std::pair(gates, first->get());
    return at::GradMode::is_enabled() ? values.clone().lerp(to, by) : values.lerp_(to, by);
  }

 private:
  ValueResidual kind_ = ValueResidual::none;
  nn::Linear gates_{nullptr};
};

}  // namespace headroom::inline v0::models
