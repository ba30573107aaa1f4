#pragma once

#include <vector>

#include "headroom/core/attention_problem.hpp"

namespace headroom::inline v0::core {

/// The definition, row by row in plain loops: what the kernels are tested against. Shapes and meaning as in
/// attention_forward.
template <class Scalar, Mask M = NoMask>
void attention_forward_reference(std::type_identity_t<TensorView<const Scalar>> q,
                                 std::type_identity_t<TensorView<const Scalar>> k,
                                 std::type_identity_t<TensorView<const Scalar>> v, TensorView<Scalar> output,
                                 TensorView<double> lse, const AttentionParams& params = {}, const M& mask = {}) {
  detail::check_shapes<Scalar>(q, k, v, output, lse, params);
  const Scalar scale = static_cast<Scalar>(params.scale_for(q.dim()));
  std::vector<Scalar> weight(k.length());
  for (Index b = 0; b < q.batch(); ++b) {
    for (Index h = 0; h < q.heads(); ++h) {
      for (Index i = 0; i < q.length(); ++i) {
        const KeyRange range = mask.keys(b, h, i) & KeyRange{0, k.length()};
        Scalar maximum = std::numeric_limits<Scalar>::lowest(), sum = 0;
        for (Index j = range.begin; j < range.end; ++j) {
          weight[j] = 0;
          for (Index d = 0; d < q.dim(); ++d) weight[j] += q(b, h, i, d) * k(b, h, j, d);
          weight[j] *= scale;
          maximum = std::max(maximum, weight[j]);
        }
        for (Index j = range.begin; j < range.end; ++j) sum += weight[j] = std::exp(weight[j] - maximum);
        for (Index d = 0; d < v.dim(); ++d) {
          Scalar mean = 0;
          for (Index j = range.begin; j < range.end; ++j) mean += weight[j] / sum * v(b, h, j, d);
          output(b, h, i, d) = mean;
        }
        if (lse.data != nullptr) {
          lse(b, h, i, 0) = range.empty() ? -std::numeric_limits<double>::infinity()
                                          : static_cast<double>(maximum) + std::log(static_cast<double>(sum));
        }
      }
    }
  }
}

/// Gradients by the chain rule through stored weights. Shapes and meaning as in attention_backward.
template <class Scalar, Mask M = NoMask>
void attention_backward_reference(std::type_identity_t<TensorView<const Scalar>> grad_output,
                                  std::type_identity_t<TensorView<const Scalar>> q,
                                  std::type_identity_t<TensorView<const Scalar>> k,
                                  std::type_identity_t<TensorView<const Scalar>> v, TensorView<Scalar> grad_q,
                                  TensorView<Scalar> grad_k, TensorView<Scalar> grad_v,
                                  const AttentionParams& params = {}, const M& mask = {}) {
  const Scalar scale = static_cast<Scalar>(params.scale_for(q.dim()));
  std::vector<Scalar> weight(k.length()), grad_weight(k.length());
  const auto clear = [](const TensorView<Scalar>& x, Index b, Index h) {
    for (Index i = 0; i < x.length(); ++i) {
      for (Index d = 0; d < x.dim(); ++d) x(b, h, i, d) = 0;
    }
  };
  for (Index b = 0; b < q.batch(); ++b) {
    for (Index h = 0; h < q.heads(); ++h) {
      clear(grad_q, b, h), clear(grad_k, b, h), clear(grad_v, b, h);
      for (Index i = 0; i < q.length(); ++i) {
        const KeyRange range = mask.keys(b, h, i) & KeyRange{0, k.length()};
        Scalar maximum = std::numeric_limits<Scalar>::lowest(), sum = 0, delta = 0;
        for (Index j = range.begin; j < range.end; ++j) {
          weight[j] = grad_weight[j] = 0;
          for (Index d = 0; d < q.dim(); ++d) weight[j] += q(b, h, i, d) * k(b, h, j, d);
          for (Index d = 0; d < v.dim(); ++d) grad_weight[j] += grad_output(b, h, i, d) * v(b, h, j, d);
          weight[j] *= scale;
          maximum = std::max(maximum, weight[j]);
        }
        for (Index j = range.begin; j < range.end; ++j) sum += weight[j] = std::exp(weight[j] - maximum);
        for (Index j = range.begin; j < range.end; ++j) delta += (weight[j] /= sum) * grad_weight[j];
        for (Index j = range.begin; j < range.end; ++j) {
          const Scalar grad_score = weight[j] * (grad_weight[j] - delta) * scale;
          for (Index d = 0; d < v.dim(); ++d) grad_v(b, h, j, d) += weight[j] * grad_output(b, h, i, d);
          for (Index d = 0; d < q.dim(); ++d) grad_q(b, h, i, d) += grad_score * k(b, h, j, d);
          for (Index d = 0; d < q.dim(); ++d) grad_k(b, h, j, d) += grad_score * q(b, h, i, d);
        }
      }
    }
  }
}

}  // namespace headroom::inline v0::core
