#pragma once

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

#include "headroom/core/error.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/nn/rms_norm.hpp"
#include "headroom/runtime/dry_run.hpp"

// Residual streams (hyper-connections; Zhu et al. 2024, arXiv:2409.19606): several tokens take the place of one, and
// layers read and write weighted sums of them.
namespace headroom::inline v0::nn::detail {

/// Streams x [G,S,L,dim], and one more, [G,1,L,dim], where there is; `weights` [G,L,S or S+1,T] of each position.
struct StreamMix {
  torch::Tensor x, weights, one_more = {};

  int64_t groups() const { return x.size(0); }
  int64_t length() const { return x.size(2); }
  int64_t dim() const { return x.size(3); }
  int64_t streams() const { return x.size(1) + (one_more.defined() ? 1 : 0); }
  int64_t sums() const { return weights.size(3); }
  bool has_float_rows() const {
    return detail::has_float_rows(x) && detail::has_float_rows(weights) &&
           (!one_more.defined() || detail::has_float_rows(one_more));
  }
  /// All streams in one tensor.
  torch::Tensor joined() const { return one_more.defined() ? torch::cat({x, one_more}, 1) : x; }
};

/// Pointers to the rows of a position, of dense tensors [G,S,L,dim].
template <class Scalar>
struct StreamRows {
  Scalar *x, *one_more;          // the latter is null where there is none
  int64_t streams, length, dim;  // of x

  Scalar* operator()(int64_t group, int64_t stream, int64_t l) const {
    if (stream == streams) return one_more + (group * length + l) * dim;
    return x + ((group * streams + stream) * length + l) * dim;
  }
};

inline StreamRows<const float> rows_of(const StreamMix& mix) {
  return {mix.x.const_data_ptr<float>(), mix.one_more.defined() ? mix.one_more.const_data_ptr<float>() : nullptr,
          mix.x.size(1), mix.length(), mix.dim()};
}

inline constexpr int64_t kMixedPositions = 16;  ///< that are worth a thread

/// out [G,T,L,dim]: sums of the streams, dense floats on the CPU.
inline void mix_rows(const StreamMix& mix, const torch::Tensor& out) {
  if (is_dry(out)) return;
  const int64_t length = mix.length(), dim = mix.dim(), streams = mix.streams(), sums = mix.sums();
  const StreamRows<const float> from = rows_of(mix);
  const StreamRows<float> to{out.mutable_data_ptr<float>(), nullptr, sums, length, dim};
  const float* const weights = mix.weights.const_data_ptr<float>();
  at::parallel_for(0, mix.groups() * length, kMixedPositions, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* const w = weights + i * streams * sums;
      for (int64_t t = 0; t < sums; ++t) {
        Row sum(to(i / length, t, i % length), dim);
        sum = ConstRow(from(i / length, 0, i % length), dim) * w[t];
        for (int64_t s = 1; s < streams; ++s) sum += ConstRow(from(i / length, s, i % length), dim) * w[s * sums + t];
      }
    }
  });
}

/// Gradients of a StreamMix, in a StreamMix.
// forward did: out_t = sum over s of x_s·weight_st
inline void mix_rows_backward(const StreamMix& mix, const torch::Tensor& grad, const StreamMix& gradients) {
  if (is_dry(grad)) return;
  const int64_t length = mix.length(), dim = mix.dim(), streams = mix.streams(), sums = mix.sums();
  const StreamRows<const float> x = rows_of(mix);
  const StreamRows<const float> given{grad.const_data_ptr<float>(), nullptr, sums, length, dim};
  const StreamRows<float> to{gradients.x.mutable_data_ptr<float>(),
                             mix.one_more.defined() ? gradients.one_more.mutable_data_ptr<float>() : nullptr,
                             mix.x.size(1), length, dim};
  const float* const weights = mix.weights.const_data_ptr<float>();
  float* const of_weights = gradients.weights.mutable_data_ptr<float>();
  at::parallel_for(0, mix.groups() * length, kMixedPositions, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto g = [&](int64_t t) { return ConstRow(given(i / length, t, i % length), dim); };
      for (int64_t s = 0; s < streams; ++s) {
        const int64_t place = (i * streams + s) * sums;
        const ConstRow row(x(i / length, s, i % length), dim);
        for (int64_t t = 0; t < sums; ++t) of_weights[place + t] = (row * g(t)).sum();
        Row sum(to(i / length, s, i % length), dim);
        sum = g(0) * weights[place];
        for (int64_t t = 1; t < sums; ++t) sum += g(t) * weights[place + t];
      }
    }
  });
}

/// Sums of streams [G,T,L,dim]; no graph.
HEADROOM_KERNEL torch::Tensor mixed(const StreamMix& mix);
/// The gradients of x, weights and one_more, with a graph where gradients are enabled.
HEADROOM_KERNEL StreamMix mix_gradients(const StreamMix& mix, const torch::Tensor& grad);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL torch::Tensor mixed(const StreamMix& mix) {
  if (!mix.has_float_rows()) {
    return torch::einsum("gslc,glst->gtlc", {mix.joined(), mix.weights}).to(mix.x.scalar_type());
  }
  const torch::Tensor out = torch::empty({mix.groups(), mix.sums(), mix.length(), mix.dim()}, mix.x.options());
  mix_rows(mix, out);
  return out;
}

HEADROOM_KERNEL StreamMix mix_gradients(const StreamMix& mix, const torch::Tensor& grad) {
  if (!mix.has_float_rows() || !has_float_rows(grad) || torch::GradMode::is_enabled()) {
    const torch::Tensor of_all = torch::einsum("gtlc,glst->gslc", {grad, mix.weights});
    const torch::Tensor of_weights = torch::einsum("gslc,gtlc->glst", {mix.joined(), grad});
    if (!mix.one_more.defined()) return {of_all, of_weights};
    return {of_all.narrow(1, 0, mix.x.size(1)), of_weights, of_all.narrow(1, mix.x.size(1), 1)};
  }
  const StreamMix result{torch::empty_like(mix.x), torch::empty_like(mix.weights),
                         mix.one_more.defined() ? torch::empty_like(mix.one_more) : torch::Tensor()};
  mix_rows_backward(mix, grad.contiguous(), result);
  return result;
}
#endif

/// Saves what it is given.
struct StreamMixFunction : torch::autograd::Function<StreamMixFunction> {
  /// tensors: x, weights, and one_more where there is
  static torch::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList tensors) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    ctx->save_for_backward(tensors.vec());
    return mixed(of(tensors));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const StreamMix grad = mix_gradients(of(saved), grads[0]);
    torch::autograd::variable_list result{grad.x, grad.weights};
    if (saved.size() > 2) result.push_back(grad.one_more);
    return result;
  }

 private:
  static StreamMix of(at::TensorList tensors) {
    return {tensors[0], tensors[1], tensors.size() > 2 ? tensors[2] : torch::Tensor()};
  }
};

}  // namespace headroom::inline v0::nn::detail

namespace headroom::inline v0::nn {

/// Weighted sums of streams at each position: x [G,S,L,dim], weights [G,L,S,T] -> [G,T,L,dim], where out_t is the sum
/// over s of weight_st·x_s. With `one_more` [G,1,L,dim], one stream that lies elsewhere, weights are [G,L,S+1,T].
/// Computed in x's dtype, under autocast as well. Differentiable; saves what it is given. Throws
/// headroom.nn.streams.shape.
inline torch::Tensor mix_streams(const torch::Tensor& x, const torch::Tensor& weights,
                                 const std::optional<torch::Tensor>& one_more = {}) {
  const bool more = one_more.has_value();
  require(x.dim() == 4 && weights.dim() == 4 && weights.size(0) == x.size(0) && weights.size(1) == x.size(2) &&
              weights.size(2) == x.size(1) + more,
          "headroom.nn.streams.shape", "x is ", x.sizes(), " and the weights ", weights.sizes(),
          more ? " for one stream more" : "", "; expected x [G,S,L,dim] and weights [G,L,", more ? "S+1" : "S", ",T]");
  require(!more || (one_more->dim() == 4 && one_more->size(0) == x.size(0) && one_more->size(1) == 1 &&
                    one_more->sizes().slice(2) == x.sizes().slice(2)),
          "headroom.nn.streams.shape", "x is ", x.sizes(), " and the stream more ",
          more ? one_more->sizes() : at::IntArrayRef(), "; expected [G,1,L,dim]");
  const auto dense = [&](const torch::Tensor& t) { return t.to(x.scalar_type()).contiguous(); };
  torch::autograd::variable_list tensors{x.contiguous(), dense(weights)};
  if (more) tensors.push_back(dense(*one_more));
  return detail::StreamMixFunction::apply(at::TensorList(tensors));
}

}  // namespace headroom::inline v0::nn
