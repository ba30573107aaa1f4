#pragma once

#include "headroom/attention/backend.hpp"
#include "headroom/attention/tiled.hpp"

namespace headroom::inline v0::detail {

struct TiledBackend {
  static constexpr bool kDifferentiableLse = true;

  static AttentionForward forward(const AttentionInputs& in) { return tiled_attention(in); }
  static AttentionGradients backward(const AttentionInputs& in, const AttentionForward& forward,
                                     const ResultGradients& grad, const WantedGradients& wanted) {
    const auto empty_as = [](const torch::Tensor& x) { return empty_in_order_of(x, x.sizes(), x.options()); };
    AttentionGradients result{empty_as(in.q), empty_as(in.k), empty_as(in.v)};
    write_gradients(in, forward, grad, wanted, result);
    return result;
  }

  /// The same into q, k and v of `result`, which have any strides.
  static void write_gradients(const AttentionInputs& in, const AttentionForward& forward, const ResultGradients& grad,
                              const WantedGradients& wanted, AttentionGradients& result) {
    const TiledParamGradients sums(in.q, in.request, wanted);
    tiled_attention_backward(in, forward, grad, result, sums);
    sums.store(result, in.request);
  }
};

}  // namespace headroom::inline v0::detail
