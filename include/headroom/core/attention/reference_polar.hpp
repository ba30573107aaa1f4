#pragma once

#include "headroom/core/attention/problem.hpp"

namespace headroom::inline v0::core::detail {

/// The product of a query and a key with polar position embedding, by its definition.
template <class Scalar>
struct PolarPair {
  TensorView<const Scalar> q, k;
  const AttentionParams& params;
  HeadIndex index;
  Index i, j;

  /// log(1 + e^x), from 20 on x, and its derivative.
  static Scalar softplus(Scalar x) { return x > 20 ? x : std::log1p(std::exp(x)); }
  static Scalar slope(Scalar x) { return x > 20 ? Scalar(1) : 1 / (1 + std::exp(-x)); }

  Scalar query(Index d) const { return q(index.b, index.h, i, d); }
  Scalar key(Index d) const { return k(index.b, index.h, j, d); }
  /// Cosine and sine of the angle from query to key.
  std::array<Scalar, 2> turn(Index d) const {
    const Index dim = q.dim();
    const auto at = [&](const StoredTensor& table, Index h, Index row) {
      return std::array{static_cast<Scalar>(table.at(0, h, row, d)), static_cast<Scalar>(table.at(0, h, row, dim + d))};
    };
    const auto [qc, qs] = at(params.polar, 0, params.table_row_of_query(i));
    auto [kc, ks] = at(params.polar, 0, params.table_row_of_key(j));
    if (params.polar_phase) {
      const auto [pc, ps] = at(params.polar_phase, index.h * params.polar_phase.shape[1] / q.heads(), 0);
      const Scalar cosine = kc * pc - ks * ps;
      ks = ks * pc + kc * ps, kc = cosine;
    }
    return {kc * qc + ks * qs, ks * qc - kc * qs};
  }

  Scalar product() const {
    Scalar sum = 0;
    for (Index d = 0; d < q.dim(); ++d) sum += softplus(query(d)) * softplus(key(d)) * turn(d)[0];
    return sum;
  }
  /// Adds `grad` times the derivatives of the product to gradients of q, of k and, unless it is null, of phases.
  void add_gradients(Scalar grad, const TensorView<Scalar>& grad_q, const TensorView<Scalar>& grad_k,
                     const TensorView<double>& grad_phase) const {
    const auto [b, h] = index;
    for (Index d = 0; d < q.dim(); ++d) {
      const auto [cosine, sine] = turn(d);
      const Scalar of_q = softplus(query(d)), of_k = softplus(key(d));
      grad_q(b, h, i, d) += grad * slope(query(d)) * of_k * cosine;
      grad_k(b, h, j, d) += grad * of_q * slope(key(d)) * cosine;
      if (grad_phase.data == nullptr) continue;
      grad_phase(0, h * grad_phase.heads() / q.heads(), 0, d) -= static_cast<double>(grad * of_q * of_k * sine);
    }
  }
};

}  // namespace headroom::inline v0::core::detail
