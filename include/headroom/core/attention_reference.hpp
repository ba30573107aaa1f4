#pragma once

#include <vector>

#include "headroom/core/attention_backward.hpp"

namespace headroom::inline v0::core {

namespace detail {

/// One row of weights by the definition, in plain loops.
template <class Scalar>
struct ReferenceRow {
  std::vector<bool> visible;
  std::vector<Scalar> weight;     // before dropout
  std::vector<Scalar> kept;       // what dropout multiplies them by
  std::vector<Scalar> cap_slope;  // derivative of the softcap
  Scalar sink_weight = 0;
  double lse = -std::numeric_limits<double>::infinity();

  template <Mask M>
  ReferenceRow(const TensorView<const Scalar>& q, const TensorView<const Scalar>& k, const AttentionParams& params,
               const M& mask, Index b, Index h, Index i)
      : visible(k.length()), weight(k.length()), kept(k.length(), 1), cap_slope(k.length(), 1) {
    const KeyRange range = mask.keys(b, h, i) & KeyRange{0, k.length()};
    const Scalar scale = static_cast<Scalar>(params.scale_for(q.dim())), cap = static_cast<Scalar>(params.softcap);
    const Index p = params.position(i), reach = params.relative_bias.dim() / 2;
    const std::uint32_t row_key = params.dropout.row_key(
        static_cast<std::uint32_t>(params.first_head + b * q.heads() + h), static_cast<std::uint32_t>(i));
    Scalar maximum = std::numeric_limits<Scalar>::lowest(), sum = 0;
    bool any = false;
    for (Index j = range.begin; j < range.end; ++j) {
      visible[j] =
          (params.mask.data == nullptr || params.mask(b, h, i, j) == params.mask_visible) &&
          (params.block_mask.data == nullptr || params.block_mask(b, h, i / params.block_size, j / params.block_size));
      if (!visible[j]) continue;
      any = true;
      Scalar s = 0;
      for (Index d = 0; d < q.dim(); ++d) s += turned(q, params, b, h, i, p, d) * turned(k, params, b, h, j, j, d);
      s *= scale;
      if (params.softcap > 0) {
        const Scalar t = std::tanh(s / cap);
        cap_slope[j] = 1 - t * t;
        s = cap * t;
      }
      if (params.bias) s += static_cast<Scalar>(params.bias.at(b, h, i, j));
      if (params.relative_bias) {
        s += static_cast<Scalar>(params.relative_bias.at(0, h, 0, reach + std::clamp(p - j, -reach, reach)));
      }
      if (params.slopes) {
        s -= static_cast<Scalar>(params.slopes.at(b, h, i, 0)) * static_cast<Scalar>(std::abs(p - j));
      }
      if (params.dropout.active()) {
        const bool keeps = Dropout::bits(row_key, static_cast<std::uint32_t>(j)) >= params.dropout.threshold();
        kept[j] = keeps ? static_cast<Scalar>(params.dropout.gain()) : Scalar(0);
      }
      weight[j] = s;
      maximum = std::max(maximum, s);
    }
    if (params.sink) {
      any = true;
      maximum = std::max(maximum, static_cast<Scalar>(params.sink.at(0, h, 0, 0)));
      sink_weight = static_cast<Scalar>(std::exp(static_cast<Scalar>(params.sink.at(0, h, 0, 0)) - maximum));
      sum = sink_weight;
    }
    for (Index j = 0; j < k.length(); ++j) {
      if (visible[j]) sum += weight[j] = std::exp(weight[j] - maximum);
    }
    if (!any) return;
    for (Scalar& w : weight) w /= sum;
    sink_weight /= sum;
    lse = static_cast<double>(maximum) + std::log(static_cast<double>(sum));
  }

  /// Feature d of row (b,h,l) after the rotary embedding of position p.
  static Scalar turned(const TensorView<const Scalar>& x, const AttentionParams& params, Index b, Index h, Index l,
                       Index p, Index d) {
    if (!params.rotary || d >= params.rotary.dim()) return x(b, h, l, d);
    const Index even = d / 2 * 2;
    const auto cosine = static_cast<Scalar>(params.rotary.at(0, 0, p, even));
    const auto sine = static_cast<Scalar>(params.rotary.at(0, 0, p, even + 1));
    return d == even ? x(b, h, l, even) * cosine - x(b, h, l, even + 1) * sine
                     : x(b, h, l, even) * sine + x(b, h, l, even + 1) * cosine;
  }
  /// Adds c·(row of x after rotation) to the gradient of a row that was turned by position p. forward did: score +=
  /// turned(to)·turned(x)
  static void add_turned(const TensorView<Scalar>& to, Index to_l, Index to_p, const TensorView<const Scalar>& x,
                         Index l, Index p, const AttentionParams& params, Index b, Index h, Scalar c) {
    for (Index d = 0; d < to.dim(); ++d) {
      const Scalar y = c * turned(x, params, b, h, l, p, d);
      if (!params.rotary || d >= params.rotary.dim()) {
        to(b, h, to_l, d) += y;
        continue;
      }
      const Index even = d / 2 * 2;
      const auto cosine = static_cast<Scalar>(params.rotary.at(0, 0, to_p, even));
      const auto sine = static_cast<Scalar>(params.rotary.at(0, 0, to_p, even + 1));
      to(b, h, to_l, even) += d == even ? y * cosine : y * sine;
      to(b, h, to_l, even + 1) += d == even ? -y * sine : y * cosine;
    }
  }
};

/// View of k or v, or of their gradients, with the heads and batches of q: those that share memory overlap.
template <class Scalar>
TensorView<Scalar> per_query_head(const TensorView<Scalar>& x, Index b, Index h, Index heads) {
  TensorView<Scalar> view = x;
  view.strides[0] = view.strides[1] = 0;
  view.data += (x.shape[0] == 1 ? 0 : b * x.strides[0]) + h * x.shape[1] / heads * x.strides[1];
  return view;
}

}  // namespace detail

/// The definition, row by row in plain loops: what the kernels are tested against. Shapes and meaning as in
/// attention_forward.
template <class Scalar, Mask M = NoMask>
void attention_forward_reference(std::type_identity_t<TensorView<const Scalar>> q,
                                 std::type_identity_t<TensorView<const Scalar>> k,
                                 std::type_identity_t<TensorView<const Scalar>> v, TensorView<Scalar> output,
                                 TensorView<double> lse, const AttentionParams& params = {}, const M& mask = {}) {
  detail::check_shapes({q, k, v, output, lse}, params);
  for (Index b = 0; b < q.batch(); ++b) {
    for (Index h = 0; h < q.heads(); ++h) {
      const auto k_head = detail::per_query_head(k, b, h, q.heads()),
                 v_head = detail::per_query_head(v, b, h, q.heads());
      for (Index i = 0; i < q.length(); ++i) {
        const detail::ReferenceRow<Scalar> row(q, k_head, params, mask, b, h, i);
        for (Index d = 0; d < v.dim(); ++d) {
          Scalar mean = 0;
          for (Index j = 0; j < k.length(); ++j) {
            if (row.visible[j]) mean += row.weight[j] * row.kept[j] * v_head(b, h, j, d);
          }
          output(b, h, i, d) = mean;
        }
        if (lse.data != nullptr) lse(b, h, i, 0) = row.lse;
      }
    }
  }
}

/// Gradients by the chain rule through stored weights. Shapes and meaning as in attention_backward.
template <class Scalar, Mask M = NoMask>
void attention_backward_reference(
    std::type_identity_t<TensorView<const Scalar>> grad_output, std::type_identity_t<TensorView<const Scalar>> q,
    std::type_identity_t<TensorView<const Scalar>> k, std::type_identity_t<TensorView<const Scalar>> v,
    TensorView<Scalar> grad_q, TensorView<Scalar> grad_k, TensorView<Scalar> grad_v, const AttentionParams& params = {},
    const M& mask = {}, const AttentionParamGradients& param_grads = {}, TensorView<const double> grad_lse = {}) {
  using Row = detail::ReferenceRow<Scalar>;
  const Scalar scale = static_cast<Scalar>(params.scale_for(q.dim()));
  const auto clear = [](const TensorView<Scalar>& x) {
    for (Index b = 0; b < x.batch(); ++b) {
      for (Index h = 0; h < x.heads(); ++h) {
        for (Index i = 0; i < x.length(); ++i) {
          for (Index d = 0; d < x.dim(); ++d) x(b, h, i, d) = 0;
        }
      }
    }
  };
  clear(grad_q), clear(grad_k), clear(grad_v);
  std::vector<Scalar> grad_weight(k.length());
  for (Index b = 0; b < q.batch(); ++b) {
    for (Index h = 0; h < q.heads(); ++h) {
      const auto of_head = [&](const auto& x) { return detail::per_query_head(x, b, h, q.heads()); };
      const auto k_head = of_head(k), v_head = of_head(v);
      const auto grad_k_head = of_head(grad_k), grad_v_head = of_head(grad_v);
      for (Index i = 0; i < q.length(); ++i) {
        const Row row(q, k_head, params, mask, b, h, i);
        const Index p = params.position(i), reach = params.relative_bias.dim() / 2;
        Scalar delta = grad_lse.data != nullptr ? -static_cast<Scalar>(grad_lse(b, h, i, 0)) : Scalar(0);
        for (Index j = 0; j < k.length(); ++j) {
          if (!row.visible[j]) continue;
          grad_weight[j] = 0;
          for (Index d = 0; d < v.dim(); ++d) grad_weight[j] += grad_output(b, h, i, d) * v_head(b, h, j, d);
          grad_weight[j] *= row.kept[j];
          delta += row.weight[j] * grad_weight[j];
        }
        if (param_grads.sink.data != nullptr) {
          param_grads.sink(0, h, 0, 0) -= static_cast<double>(row.sink_weight) * static_cast<double>(delta);
        }
        for (Index j = 0; j < k.length(); ++j) {
          if (!row.visible[j]) continue;
          const Scalar grad = row.weight[j] * (grad_weight[j] - delta);
          if (param_grads.bias) param_grads.bias.head(b, h, q.heads()).template as<Scalar>()(i, j) += grad;
          if (param_grads.relative_bias.data != nullptr) {
            param_grads.relative_bias(0, h, 0, reach + std::clamp(p - j, -reach, reach)) += static_cast<double>(grad);
          }
          if (param_grads.slopes.data != nullptr) {
            param_grads.slopes(b, h, i, 0) -= static_cast<double>(grad) * static_cast<double>(std::abs(p - j));
          }
          const Scalar grad_score = grad * row.cap_slope[j] * scale;
          for (Index d = 0; d < v.dim(); ++d) {
            grad_v_head(b, h, j, d) += row.weight[j] * row.kept[j] * grad_output(b, h, i, d);
          }
          Row::add_turned(grad_q, i, p, k_head, j, j, params, b, h, grad_score);
          Row::add_turned(grad_k_head, j, j, q, i, p, params, b, h, grad_score);
        }
      }
    }
  }
}

}  // namespace headroom::inline v0::core
