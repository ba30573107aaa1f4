#pragma once

#include <torch/csrc/autograd/custom_function.h>

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

/// Calls f(3-D parts) for tensors [..., H, *, *] of equal leading dimensions: batches of matrices that one stride steps
/// through, as many at a time as heads or elements of a batch dimension. Undefined tensors stay undefined; nothing is
/// copied.
template <class F>
void for_each_matrix_batch(const std::vector<torch::Tensor>& tensors, F&& f) {
  for_each_4d(tensors, 0, [&](at::TensorList x, int64_t) {
    const int64_t along = x[0].size(0) >= x[0].size(1) ? 1 : 0;
    for (int64_t i = 0; i < x[0].size(along); ++i) {
      std::vector<torch::Tensor> parts;
      for (const torch::Tensor& t : x) parts.push_back(t.defined() ? t.select(along, i) : t);
      f(at::TensorList(parts));
    }
  });
}

/// Weights of features for features of a batch of heads: q, k [n,L,D], factor [n,1,1].
struct FeatureWeights {
  torch::Tensor q_norm, k_norm;   // [n,D,1], [n,1,D]
  torch::Tensor scores, weights;  // [n,D,D]
  torch::Tensor kept;             // what dropout multiplies weights with, [n,D,D] or undefined

  /// `heads` [n,1,1]: flat indices, undefined without dropout.
  FeatureWeights(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& factor,
                 const torch::Tensor& heads, const core::Dropout& dropout) {
    const auto norm = [](const torch::Tensor& x) {
      return torch::linalg_vector_norm(x, 2, at::IntArrayRef{1}).clamp_min(kSmallestNorm);
    };
    q_norm = norm(q).unsqueeze(2), k_norm = norm(k).unsqueeze(1);
    scores = torch::bmm(q.transpose(1, 2), k) / q_norm / k_norm * factor;
    weights = scores.softmax(-1);
    if (!heads.defined()) return;
    const torch::Tensor features = torch::arange(q.size(2), heads.options());
    kept = DropoutMask::kept(dropout, heads.flatten(), features, features).to(q.scalar_type()) * dropout.gain();
  }
  torch::Tensor dropped() const { return kept.defined() ? weights * kept : weights; }
};

/// Saves q, k and v; the weights are computed again in the backward pass, which is differentiable in turn.
struct LinearAttentionFunction : torch::autograd::Function<LinearAttentionFunction> {
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& q, const torch::Tensor& k,
                               const torch::Tensor& v, const std::optional<torch::Tensor>& given_temperature,
                               double scale, core::Dropout dropout) {
    const torch::Tensor log_temperature = given_temperature.value_or(torch::Tensor());
    ctx->save_for_backward({q, k, v, log_temperature});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout.probability;
    ctx->saved_data["seed"] = static_cast<int64_t>(dropout.seed);
    const torch::Tensor output = empty_in_order_of(q, q.sizes(), q.options());
    const auto [factors, heads] = per_head(q, log_temperature, scale, dropout);
    for_each_matrix_batch({q, k, v, factors, heads, output}, [&](at::TensorList x) {
      const auto type = compute_type(q);
      const FeatureWeights w(x[0].to(type), x[1].to(type), x[3], x[4], dropout);
      x[5].copy_(torch::bmm(x[2].to(type), w.dropped().transpose(1, 2)));
    });
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const torch::Tensor &q = saved[0], &log_temperature = saved[3];
    const core::Dropout dropout{ctx->saved_data["dropout"].toDouble(),
                                static_cast<std::uint64_t>(ctx->saved_data["seed"].toInt())};
    const auto [factors, heads] = per_head(q, log_temperature, ctx->saved_data["scale"].toDouble(), dropout);
    torch::autograd::variable_list result;
    for (int i = 0; i < 3; ++i) result.push_back(empty_in_order_of(saved[i], saved[i].sizes(), saved[i].options()));
    const torch::Tensor shares = torch::empty(factors.sizes(), factors.options());
    for_each_matrix_batch({q, saved[1], saved[2], factors, heads, grads[0], result[0], result[1], result[2], shares},
                          [&](at::TensorList x) {
                            const auto type = compute_type(q);
                            const torch::Tensor q = x[0].to(type), k = x[1].to(type), v = x[2].to(type),
                                                grad = x[5].to(type);
                            const FeatureWeights w(q, k, x[3], x[4], dropout);
                            // forward did: output = v·weightsᵀ, scores = factor·qᵀ·k / norms
                            x[8].copy_(torch::bmm(grad, w.dropped()));
                            torch::Tensor grad_weights = torch::bmm(grad.transpose(1, 2), v);
                            if (w.kept.defined()) grad_weights = grad_weights * w.kept;
                            const torch::Tensor grad_scores =
                                w.weights * (grad_weights - (w.weights * grad_weights).sum(-1, /*keepdim=*/true));
                            const torch::Tensor growth = grad_scores * w.scores;  // by the logarithm of a factor
                            const torch::Tensor grad_products = grad_scores / w.q_norm / w.k_norm * x[3];
                            const auto by_norm = [&](int64_t dim, const torch::Tensor& norm) {  // [n,1,D]
                              const torch::Tensor sums = growth.sum(dim, /*keepdim=*/true) / norm.square();
                              return sums.masked_fill(norm <= kSmallestNorm, 0).view({q.size(0), 1, -1});
                            };
                            x[6].copy_(torch::bmm(k, grad_products.transpose(1, 2)) - q * by_norm(2, w.q_norm));
                            x[7].copy_(torch::bmm(q, grad_products) - k * by_norm(1, w.k_norm));
                            x[9].copy_(growth.sum({1, 2}, /*keepdim=*/true));
                          });
    torch::Tensor grad_temperature;
    if (log_temperature.defined()) {
      grad_temperature = shares.sum_to_size({q.size(-3), 1, 1}).flatten().to(log_temperature.scalar_type());
    }
    return {result[0], result[1], result[2], grad_temperature, {}, {}};
  }

 private:
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
  return detail::LinearAttentionFunction::apply(
      q, k, v, options.log_temperature(), options.scale(),
      detail::checked_dropout(options.dropout(), std::nullopt, options.generator()));
}
#endif

}  // namespace headroom::inline v0
