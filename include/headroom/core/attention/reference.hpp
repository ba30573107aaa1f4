#pragma once

#include <Eigen/Core>
#include <limits>

#include "headroom/core/attention/checks.hpp"
#include "headroom/core/attention/reference_polar.hpp"
#include "headroom/core/mask.hpp"

namespace headroom::inline v0::core {

namespace detail {

/// Row l of one head, turned by the rotary embedding of position p.
template <class Scalar>
struct TurnedRow {
  const TensorView<Scalar>& x;
  const AttentionParams& params;
  HeadIndex head;
  Index l, p;

  bool turns(Index d) const { return params.rotary && d < params.rotary.dim(); }
  Scalar& plain(Index d) const { return x(head.b, head.h, l, d); }
  std::remove_const_t<Scalar> angle(Index element) const {
    return static_cast<std::remove_const_t<Scalar>>(params.rotary.at(0, 0, p, element));
  }
  /// Feature d.
  std::remove_const_t<Scalar> operator()(Index d) const {
    if (!turns(d)) return plain(d);
    const Index even = d / 2 * 2;
    const auto cosine = angle(even), sine = angle(even + 1);
    return d == even ? plain(even) * cosine - plain(even + 1) * sine : plain(even) * sine + plain(even + 1) * cosine;
  }
  /// Adds c·other to the row of which this one is a turned gradient. forward did: score += turned(this)·turned(other)
  void add(Scalar c, const TurnedRow<const Scalar>& other) const {
    for (Index d = 0; d < x.dim(); ++d) {
      const Scalar y = c * other(d);
      if (!turns(d)) {
        plain(d) += y;
        continue;
      }
      const Index even = d / 2 * 2;
      const auto cosine = angle(even), sine = angle(even + 1);
      plain(even) += d == even ? y * cosine : y * sine;
      plain(even + 1) += d == even ? -y * sine : y * cosine;
    }
  }
};

/// View of k or v, or of their gradients, with the heads and batches of q: those that share memory overlap.
template <class Scalar>
TensorView<Scalar> per_query_head(const TensorView<Scalar>& x, HeadIndex head, Index heads) {
  TensorView<Scalar> view = x;
  view.strides[0] = view.strides[1] = 0;
  view.data += (x.shape[0] == 1 ? 0 : head.b * x.strides[0]) + head.h * x.shape[1] / heads * x.strides[1];
  return view;
}

/// One head of the definition.
template <class Scalar, Mask M>
struct ReferenceHead {
  HeadIndex index;
  TensorView<const Scalar> q, k, v;
  const AttentionParams& params;
  const M& mask;

  bool sees(Index i, Index j) const {
    const auto [b, h] = index;
    bool in_range = mask.keys(b, h, i).contains(j);
    if constexpr (TwoRangeMask<M>) in_range |= mask.other_keys(b, h, i).contains(j);
    return in_range && (params.mask.data == nullptr || params.mask(b, h, i, j) == params.mask_visible) &&
           (params.block_mask.data == nullptr || params.block_mask(b, h, i / params.block_size, j / params.block_size));
  }
  TurnedRow<const Scalar> query(Index i) const { return {q, params, index, i, params.table_row_of_query(i)}; }
  TurnedRow<const Scalar> key(Index j) const { return {k, params, index, j, params.table_row_of_key(j)}; }
  PolarPair<Scalar> polar(Index i, Index j) const { return {q, k, params, index, i, j}; }
  Scalar scale() const { return static_cast<Scalar>(params.scale_for(q.dim())); }
  /// Element of the relative bias.
  Index relative(Index i, Index j) const {
    const Index reach = params.relative_bias.dim() / 2;
    return reach + std::clamp(params.position(i) - j, -reach, reach);
  }
  Index distance(Index i, Index j) const { return std::abs(params.position(i) - j); }

  /// The score of a key, and the derivative of its softcap.
  Scalar score(Index i, Index j, Scalar& cap_slope) const {
    const auto [b, h] = index;
    const Scalar cap = static_cast<Scalar>(params.softcap);
    Scalar s = 0;
    if (params.polar) {
      s = polar(i, j).product();
    } else {
      for (Index d = 0; d < q.dim(); ++d) s += query(i)(d) * key(j)(d);
    }
    s *= scale();
    if (params.softcap > 0) {
      const Scalar t = std::tanh(s / cap);
      cap_slope = 1 - t * t;
      s = cap * t;
    }
    if (params.bias) s += static_cast<Scalar>(params.bias.at(b, h, i, j));
    if (params.relative_bias) s += static_cast<Scalar>(params.relative_bias.at(0, h, 0, relative(i, j)));
    if (params.slopes) {
      s -= static_cast<Scalar>(params.slopes.at(b, h, i, 0)) * static_cast<Scalar>(distance(i, j));
    }
    return s;
  }
  /// What dropout multiplies a weight by.
  Scalar kept(Index i, Index j) const {
    if (!params.dropout.active()) return 1;
    const std::uint32_t row_key = params.dropout.row_key(
        static_cast<std::uint32_t>(params.first_head + index.b * q.heads() + index.h), static_cast<std::uint32_t>(i));
    const bool keeps = Dropout::bits(row_key, static_cast<std::uint32_t>(j)) >= params.dropout.threshold();
    return keeps ? static_cast<Scalar>(params.dropout.gain()) : Scalar(0);
  }
};

/// One value a key.
template <class T>
using ReferenceValues = Eigen::Array<T, Eigen::Dynamic, 1>;

/// One row of weights by the definition, in plain loops.
template <class Scalar>
struct ReferenceRow {
  ReferenceValues<bool> visible;
  ReferenceValues<Scalar> weight;     // before dropout
  ReferenceValues<Scalar> kept;       // what dropout multiplies them by
  ReferenceValues<Scalar> cap_slope;  // derivative of the softcap
  Scalar sink_weight = 0;
  double lse = -std::numeric_limits<double>::infinity();

  template <Mask M>
  ReferenceRow(const ReferenceHead<Scalar, M>& head, Index i)
      : visible(ReferenceValues<bool>::Zero(head.k.length())),
        weight(ReferenceValues<Scalar>::Zero(head.k.length())),
        kept(ReferenceValues<Scalar>::Ones(head.k.length())),
        cap_slope(kept) {
    const auto [b, h] = head.index;
    const Index keys = head.k.length();
    Scalar maximum = std::numeric_limits<Scalar>::lowest(), sum = 0;
    bool any = false;
    for (Index j = 0; j < keys; ++j) {
      visible[j] = head.sees(i, j);
      if (!visible[j]) continue;
      any = true;
      weight[j] = head.score(i, j, cap_slope[j]);
      kept[j] = head.kept(i, j);
      maximum = std::max(maximum, weight[j]);
    }
    if (head.params.sink) {
      const Scalar sink = static_cast<Scalar>(head.params.sink.at(0, h, 0, 0));
      any = true;
      maximum = std::max(maximum, sink);
      sink_weight = static_cast<Scalar>(std::exp(sink - maximum));
      sum = sink_weight;
    }
    for (Index j = 0; j < keys; ++j) {
      if (visible[j]) sum += weight[j] = std::exp(weight[j] - maximum);
    }
    if (!any) return;
    weight /= sum;
    sink_weight /= sum;
    lse = static_cast<double>(maximum) + std::log(static_cast<double>(sum));
  }
};

template <class Scalar>
void clear(const TensorView<Scalar>& x) {
  for (Index b = 0; b < x.batch(); ++b) {
    for (Index h = 0; h < x.heads(); ++h) {
      for (Index i = 0; i < x.length(); ++i) {
        for (Index d = 0; d < x.dim(); ++d) x(b, h, i, d) = 0;
      }
    }
  }
}

/// Adds what one query contributes to all gradients.
template <class Scalar, Mask M>
void add_reference_gradients(const AttentionBackwardTensors<Scalar>& x, const ReferenceHead<Scalar, M>& head, Index i) {
  const auto [b, h] = head.index;
  const ReferenceRow<Scalar> row(head, i);
  const AttentionParamGradients& grads = x.param_grads;
  const auto grad_k = per_query_head(x.grad_k, head.index, x.q.heads()),
             grad_v = per_query_head(x.grad_v, head.index, x.q.heads());
  const Index keys = head.k.length();
  ReferenceValues<Scalar> grad_weight = ReferenceValues<Scalar>::Zero(keys);
  Scalar delta = x.grad_lse.data != nullptr ? -static_cast<Scalar>(x.grad_lse(b, h, i, 0)) : Scalar(0);
  for (Index j = 0; j < keys; ++j) {
    if (!row.visible[j]) continue;
    for (Index d = 0; d < head.v.dim(); ++d) grad_weight[j] += x.grad_output(b, h, i, d) * head.v(b, h, j, d);
    grad_weight[j] *= row.kept[j];
    delta += row.weight[j] * grad_weight[j];
  }
  if (grads.sink.data != nullptr) {
    grads.sink(0, h, 0, 0) -= static_cast<double>(row.sink_weight) * static_cast<double>(delta);
  }
  for (Index j = 0; j < keys; ++j) {
    if (!row.visible[j]) continue;
    const Scalar grad = row.weight[j] * (grad_weight[j] - delta);
    if (grads.bias) grads.bias.head(b, h, x.q.heads()).template as<Scalar>()(i, j) += grad;
    if (grads.relative_bias.data != nullptr) {
      grads.relative_bias(0, h, 0, head.relative(i, j)) += static_cast<double>(grad);
    }
    if (grads.slopes.data != nullptr) {
      grads.slopes(b, h, i, 0) -= static_cast<double>(grad) * static_cast<double>(head.distance(i, j));
    }
    const Scalar grad_score = grad * row.cap_slope[j] * head.scale();
    for (Index d = 0; d < head.v.dim(); ++d) {
      grad_v(b, h, j, d) += row.weight[j] * row.kept[j] * x.grad_output(b, h, i, d);
    }
    if (head.params.polar) {
      head.polar(i, j).add_gradients(grad_score, x.grad_q, grad_k, grads.polar_phase);
      continue;
    }
    TurnedRow<Scalar>{x.grad_q, head.params, head.index, i, head.params.table_row_of_query(i)}.add(grad_score,
                                                                                                   head.key(j));
    TurnedRow<Scalar>{grad_k, head.params, head.index, j, head.params.table_row_of_key(j)}.add(grad_score,
                                                                                               head.query(i));
  }
}

/// f(ReferenceHead) for each head of q.
template <class Scalar, class Tensors, Mask M, class F>
void for_each_reference_head(const Tensors& x, const AttentionParams& params, const M& mask, F&& f) {
  require(!params.has_functions(), "headroom.core.attention.score_function",
          "the reference knows no functions of one's own; call attention_forward and attention_backward");
  for (Index b = 0; b < x.q.batch(); ++b) {
    for (Index h = 0; h < x.q.heads(); ++h) {
      const auto shared = [&](const TensorView<const Scalar>& y) { return per_query_head(y, {b, h}, x.q.heads()); };
      f(ReferenceHead<Scalar, M>{{b, h}, x.q, shared(x.k), shared(x.v), params, mask});
    }
  }
}

}  // namespace detail

/// The definition, row by row in plain loops: what the kernels are tested against. Shapes and meaning as in
/// attention_forward.
template <class Scalar, Mask M = NoMask>
void attention_forward_reference(const AttentionTensors<Scalar>& x, const AttentionParams& params = {},
                                 const M& mask = {}) {
  detail::check_problem({x.q, x.k, x.v, x.output, x.lse}, params);
  detail::for_each_reference_head<Scalar>(x, params, mask, [&](const auto& head) {
    const auto [b, h] = head.index;
    for (Index i = 0; i < x.q.length(); ++i) {
      const detail::ReferenceRow<Scalar> row(head, i);
      for (Index d = 0; d < x.v.dim(); ++d) {
        Scalar mean = 0;
        for (Index j = 0; j < x.k.length(); ++j) {
          if (row.visible[j]) mean += row.weight[j] * row.kept[j] * head.v(b, h, j, d);
        }
        x.output(b, h, i, d) = mean;
      }
      if (x.lse.data != nullptr) x.lse(b, h, i, 0) = row.lse;
    }
  });
}

/// Gradients by the chain rule through stored weights. Shapes and meaning as in attention_backward; `output` and `lse`
/// are not read.
template <class Scalar, Mask M = NoMask>
void attention_backward_reference(const AttentionBackwardTensors<Scalar>& x, const AttentionParams& params = {},
                                  const M& mask = {}) {
  detail::clear(x.grad_q), detail::clear(x.grad_k), detail::clear(x.grad_v);
  detail::for_each_reference_head<Scalar>(x, params, mask, [&](const auto& head) {
    for (Index i = 0; i < x.q.length(); ++i) detail::add_reference_gradients(x, head, i);
  });
}

}  // namespace headroom::inline v0::core
