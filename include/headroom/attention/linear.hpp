#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "headroom/attention/checks.hpp"
#include "headroom/attention/dropout.hpp"
#include "headroom/attention/tiled.hpp"
#include "headroom/core/finite.hpp"

namespace headroom::inline v0 {

/// What may be asked of linear_attention beside q, k and v.
struct LinearAttentionOptions {
  /// Factor of the scores.
  TORCH_ARG(double, scale) = 8.0;
  /// [H]: a head's scores are multiplied by exp(log_temperature) too; differentiable.
  TORCH_ARG(std::optional<torch::Tensor>, log_temperature) = std::nullopt;
  /// Probability that a weight is dropped, in [0, 1); the others grow by 1 / (1 - dropout).
  TORCH_ARG(double, dropout) = 0.0;
  /// Where dropout's seed is drawn from; LibTorch's default CPU generator unless given.
  TORCH_ARG(std::optional<at::Generator>, generator) = std::nullopt;
};

namespace detail {

/// Norms below this count as this, so that a feature of zeros stays one.
inline constexpr double kSmallestNorm = 1e-12;

/// What linear attention reads and writes: [..., H, L, D], `factor` (of the scores), `head` (flat indices, undefined
/// without dropout) and `growth` (the gradient by a factor's logarithm) [..., H, 1, 1].
struct LinearTensors {
  torch::Tensor q, k, v, output = {}, factor = {}, head = {};
  torch::Tensor grad_output = {}, grad_q = {}, grad_k = {}, grad_v = {}, growth = {};

  std::array<torch::Tensor*, 11> all() {
    return {&q, &k, &v, &output, &factor, &head, &grad_output, &grad_q, &grad_k, &grad_v, &growth};
  }
};

/// Calls f(3-D parts): batches of matrices that one stride steps through, as many at a time as heads or elements of a
/// batch dimension. Nothing is copied.
template <class F>
void for_each_matrix_batch(const LinearTensors& tensors, F&& f) {
  for_each_4d(tensors, 0, [&](const LinearTensors& x, int64_t) {
    const int64_t along = x.q.size(0) >= x.q.size(1) ? 1 : 0;
    for (int64_t i = 0; i < x.q.size(along); ++i) {
      f(each(x, [&](const torch::Tensor& t) { return t.select(along, i); }));
    }
  });
}

inline torch::Tensor in_compute_type(const torch::Tensor& x) { return x.to(compute_type(x)); }

/// Weights of features for features of n heads.
struct FeatureWeights {
  torch::Tensor q_norm, k_norm;   // [n,D,1], [n,1,D]
  torch::Tensor scores, weights;  // [n,D,D]
  torch::Tensor kept;             // what dropout multiplies weights with, [n,D,D] or undefined

  /// q, k [n,L,D], factor and head [n,1,1]
  FeatureWeights(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& factor, const torch::Tensor& head,
                 const core::Dropout& dropout) {
    const auto norm = [](const torch::Tensor& x) {
      return torch::linalg_vector_norm(x, 2, at::IntArrayRef{1}).clamp_min(kSmallestNorm);
    };
    q_norm = norm(q).unsqueeze(2), k_norm = norm(k).unsqueeze(1);
    scores = torch::bmm(q.transpose(1, 2), k) / q_norm / k_norm * factor;
    weights = scores.softmax(-1);
    if (!head.defined()) return;
    const torch::Tensor features = torch::arange(q.size(2), head.options());
    kept = DropoutMask::kept(dropout, head.flatten(), features, features).to(q.scalar_type()) * dropout.gain();
  }
  torch::Tensor dropped() const { return kept.defined() ? weights * kept : weights; }
};

/// Saves q, k and v; the weights are computed again in the backward pass, which is differentiable in turn.
struct LinearAttentionFunction : torch::autograd::Function<LinearAttentionFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList qkv,
                               const std::optional<torch::Tensor>& given_temperature, double scale,
                               core::Dropout dropout) {
    const torch::Tensor log_temperature = given_temperature.value_or(torch::Tensor()), &q = qkv[0];
    ctx->save_for_backward({q, qkv[1], qkv[2], log_temperature});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout.probability;
    ctx->saved_data["seed"] = static_cast<int64_t>(dropout.seed);
    LinearTensors tensors{.q = q, .k = qkv[1], .v = qkv[2]};
    tensors.output = empty_in_order_of(q, q.sizes(), q.options());
    std::tie(tensors.factor, tensors.head) = per_head(q, log_temperature, scale, dropout);
    for_each_matrix_batch(tensors, [&](const LinearTensors& x) {
      const FeatureWeights w(in_compute_type(x.q), in_compute_type(x.k), x.factor, x.head, dropout);
      x.output.copy_(torch::bmm(in_compute_type(x.v), w.dropped().transpose(1, 2)));
    });
    return tensors.output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &q = saved[0], &log_temperature = saved[3];
    const core::Dropout dropout{ctx->saved_data["dropout"].toDouble(),
                                static_cast<std::uint64_t>(ctx->saved_data["seed"].toInt())};
    const auto empty_as = [](const torch::Tensor& x) { return empty_in_order_of(x, x.sizes(), x.options()); };
    LinearTensors tensors{.q = q, .k = saved[1], .v = saved[2], .grad_output = grads[0]};
    std::tie(tensors.factor, tensors.head) = per_head(q, log_temperature, ctx->saved_data["scale"].toDouble(), dropout);
    tensors.grad_q = empty_as(q), tensors.grad_k = empty_as(saved[1]), tensors.grad_v = empty_as(saved[2]);
    tensors.growth = torch::empty(tensors.factor.sizes(), tensors.factor.options());
    for_each_matrix_batch(tensors, [&](const LinearTensors& x) { differentiate(x, dropout); });
    torch::Tensor grad_temperature;
    if (log_temperature.defined()) {
      grad_temperature = tensors.growth.sum_to_size({q.size(-3), 1, 1}).flatten().to(log_temperature.scalar_type());
    }
    return {tensors.grad_q, tensors.grad_k, tensors.grad_v, grad_temperature, {}, {}};
  }

 private:
  static void differentiate(const LinearTensors& x, const core::Dropout& dropout) {
    const torch::Tensor q = in_compute_type(x.q), k = in_compute_type(x.k), v = in_compute_type(x.v),
                        grad = in_compute_type(x.grad_output);
    const FeatureWeights w(q, k, x.factor, x.head, dropout);
    // forward did: output = v·weightsᵀ, scores = factor·qᵀ·k / norms
    x.grad_v.copy_(torch::bmm(grad, w.dropped()));
    torch::Tensor grad_weights = torch::bmm(grad.transpose(1, 2), v);
    if (w.kept.defined()) grad_weights = grad_weights * w.kept;
    const torch::Tensor grad_scores = w.weights * (grad_weights - (w.weights * grad_weights).sum(-1, /*keepdim=*/true));
    const torch::Tensor growth = grad_scores * w.scores;  // by the logarithm of a factor
    const torch::Tensor grad_products = grad_scores / w.q_norm / w.k_norm * x.factor;
    const auto by_norm = [&](int64_t dim, const torch::Tensor& norm) {  // [n,1,D]
      const torch::Tensor sums = growth.sum(dim, /*keepdim=*/true) / norm.square();
      return sums.masked_fill(norm <= kSmallestNorm, 0).view({q.size(0), 1, -1});
    };
    x.grad_q.copy_(torch::bmm(k, grad_products.transpose(1, 2)) - q * by_norm(2, w.q_norm));
    x.grad_k.copy_(torch::bmm(q, grad_products) - k * by_norm(1, w.k_norm));
    x.growth.copy_(growth.sum({1, 2}, /*keepdim=*/true));
  }

  /// Factors of the scores and flat indices of the heads, [..., H, 1, 1]; no indices without dropout.
  static std::pair<torch::Tensor, torch::Tensor> per_head(const torch::Tensor& q, const torch::Tensor& log_temperature,
                                                          double scale, const core::Dropout& dropout) {
    std::vector<int64_t> sizes = q.sizes().vec();
    sizes.end()[-1] = sizes.end()[-2] = 1;
    const auto options = q.options().dtype(compute_type(q));
    const torch::Tensor factors = log_temperature.defined()
                                      ? log_temperature.to(options.dtype()).exp().view({-1, 1, 1}) * scale
                                      : torch::full({1, 1, 1}, scale, options);
    torch::Tensor heads;
    if (dropout.active()) {
      heads = torch::arange(c10::multiply_integers(sizes), options.dtype(torch::kLong)).view(sizes);
    }
    return {factors.expand(sizes), heads};
  }
};

}  // namespace detail

/// Attention among features instead of tokens, linear in the length (cross-covariance attention, El-Nouby et al. 2021):
///   output[l,d] = Σ_e softmax_e(scale·exp(log_temperature)·q̂_d·k̂_e) · v[l,e]
/// where q̂_d and k̂_e are the sequences of a feature of q and of k, divided by their Euclidean norm. All weights of a
/// head are D x D; normalised copies never exist.
/// q, k, v [..., H, L, D] of one shape and floating-point dtype (computed in float, in double for double), any strides
/// -> [..., H, L, D], in memory in the order of q's dimensions. Differentiable in q, k, v and log_temperature, any
/// number of times. Saved for backward: q, k, v. Throws headroom.attention.linear, headroom.attention.dropout.
HEADROOM_KERNEL torch::Tensor linear_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                               const LinearAttentionOptions& options = {});

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor linear_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                               const LinearAttentionOptions& options) {
  for (const torch::Tensor* x : {&q, &k, &v}) {
    require(x->defined() && x->is_floating_point() && x->layout() == torch::kStrided && x->dim() >= 3 &&
                x->sizes() == q.sizes() && x->dtype() == q.dtype() && x->device() == q.device(),
            "headroom.attention.linear",
            "q, k and v are undefined, not floating point, or differ: ", q.defined() ? q.sizes() : at::IntArrayRef(),
            ", ", k.defined() ? k.sizes() : at::IntArrayRef(), ", ", v.defined() ? v.sizes() : at::IntArrayRef(),
            "; expected [...,H,L,D] of one shape, dtype and device");
  }
  require(core::detail::is_finite(options.scale()), "headroom.attention.linear", "scale is ", options.scale(),
          ", expected a finite number");
  if (const auto& given = options.log_temperature(); given.has_value()) {
    require(given->defined() && given->is_floating_point() && given->device() == q.device() &&
                given->sizes() == q.sizes().slice(q.dim() - 3, 1),
            "headroom.attention.linear", "log_temperature is ", given->defined() ? given->sizes() : at::IntArrayRef(),
            "; expected floating point [", q.size(-3), "] on ", q.device());
  }
  const std::vector<torch::Tensor> qkv{q, k, v};
  return detail::LinearAttentionFunction::apply(
      at::TensorList(qkv), options.log_temperature(), options.scale(),
      detail::checked_dropout(options.dropout(), std::nullopt, options.generator()));
}
#endif

}  // namespace headroom::inline v0
