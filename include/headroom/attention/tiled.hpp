#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "headroom/attention/request.hpp"
#include "headroom/core/attention.hpp"

namespace headroom::inline v0::detail {

/// LibTorch's thread pool and allocator behind core's executor: at::set_num_threads counts, and so does the workspace
/// wherever LibTorch's memory is counted.
struct TorchExecutor {
  struct Workspace {
    torch::Tensor bytes;
    std::byte* data() const { return static_cast<std::byte*>(bytes.mutable_data_ptr()); }
  };

  int workers() const { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
  Workspace allocate(core::Index bytes) const { return {torch::empty({bytes}, torch::kByte)}; }
  template <class Body>
  void run(core::Index tasks, Body&& body) const {
    std::atomic<core::Index> next{0};
    at::parallel_for(0, workers(), 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        for (core::Index task; (task = next++) < tasks;) body(task, static_cast<int>(worker));
      }
    });
  }
};

/// An uninitialised tensor of shape `sizes` whose dimensions lie in memory in the order of those of `like`, without
/// gaps: the output of attention over a permuted view can be permuted back and reshaped for free.
inline torch::Tensor empty_in_order_of(const torch::Tensor& like, at::IntArrayRef sizes,
                                       const torch::TensorOptions& options) {
  std::vector<int64_t> order(like.dim()), place(like.dim()), ordered_sizes;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  for (size_t i = 0; i < order.size(); ++i) {
    ordered_sizes.push_back(sizes[order[i]]);
    place[order[i]] = static_cast<int64_t>(i);
  }
  return torch::empty(ordered_sizes, options).permute(place);
}

/// Calls f(views of 4-D parts…, first flat batch index) for tensors [..., H, L, D] of equal batch dimensions. Batch
/// dimensions that one stride can't step through are iterated over here; nothing is copied.
template <class F, class... Tensors>
void for_each_4d(F&& f, int64_t batch_index, const Tensors&... x) {
  const auto& first = std::get<0>(std::tie(x...));
  if (first.dim() == 3) return f(batch_index, x.unsqueeze(0)...);
  if (first.dim() == 4) return f(batch_index, x...);
  const auto mergeable = [](const torch::Tensor& t) {
    return t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.size(1) * t.stride(1);
  };
  const auto merged = [](const torch::Tensor& t) {
    std::vector<int64_t> sizes = t.sizes().vec(), strides = t.strides().vec();
    if (sizes[1] == 1) strides[1] = strides[0];
    sizes[1] *= sizes[0];
    return t.as_strided(at::IntArrayRef(sizes).slice(1), at::IntArrayRef(strides).slice(1));
  };
  if ((mergeable(x) && ...)) return for_each_4d(f, batch_index, merged(x)...);
  int64_t inner = 1;
  for (int64_t d = 1; d < first.dim() - 3; ++d) inner *= first.size(d);
  for (int64_t i = 0; i < first.size(0); ++i) for_each_4d(f, batch_index + i * inner, x.select(0, i)...);
}

template <class Scalar>
core::TensorView<Scalar> view_of(const torch::Tensor& x) {
  core::TensorView<Scalar> view{static_cast<Scalar*>(const_cast<void*>(x.const_data_ptr())), {}, {}};
  std::copy_n(x.sizes().begin(), 4, view.shape.begin());
  std::copy_n(x.strides().begin(), 4, view.strides.begin());
  return view;
}

/// f(mask of the 4-D part that starts at a flat batch index)
template <class F>
void with_mask(const AttentionRequest& request, int64_t batch_index, F&& f) {
  const core::CausalMask causal{};
  if (!request.key_lengths.defined()) return request.causal ? f(causal) : f(core::NoMask{});
  const core::KeyLengthMask<int64_t> lengths{request.key_lengths.const_data_ptr<int64_t>() + batch_index};
  request.causal ? f(core::BothMasks{causal, lengths}) : f(lengths);
}

/// Calls f(Scalar()) for float or double.
template <class F>
void with_scalar_type(const torch::Tensor& q, F&& f) {
  q.scalar_type() == torch::kDouble ? f(double()) : f(float());
}

inline AttentionForward tiled_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                        const AttentionRequest& request) {
  std::vector<int64_t> sizes = q.sizes().vec();
  sizes.back() = v.size(-1);
  const torch::Tensor output = empty_in_order_of(q, sizes, q.options());
  sizes.back() = 1;
  const torch::Tensor lse = torch::empty(sizes, q.options().dtype(torch::kDouble));
  with_scalar_type(q, [&](auto zero) {
    using Scalar = decltype(zero);
    for_each_4d(
        [&](int64_t batch, auto&&... x) {
          with_mask(request, batch, [&](const auto& mask) {
            [&](const auto& q4, const auto& k4, const auto& v4, const auto& o4, const auto& lse4) {
              core::attention_forward(view_of<const Scalar>(q4), view_of<const Scalar>(k4), view_of<const Scalar>(v4),
                                      view_of<Scalar>(o4), view_of<double>(lse4), {request.scale}, mask,
                                      TorchExecutor{});
            }(x...);
          });
        },
        0, q, k, v, output, lse);
  });
  return {output, lse.squeeze(-1)};
}

/// Writes the gradients into tensors of the shapes of q, k, v, with any strides.
inline void tiled_attention_backward(const torch::Tensor& grad_output, const torch::Tensor& q, const torch::Tensor& k,
                                     const torch::Tensor& v, const AttentionForward& forward,
                                     const AttentionRequest& request, const AttentionGradients& grad) {
  with_scalar_type(q, [&](auto zero) {
    using Scalar = decltype(zero);
    for_each_4d(
        [&](int64_t batch, auto&&... x) {
          with_mask(request, batch, [&](const auto& mask) {
            [&](const auto& g4, const auto& q4, const auto& k4, const auto& v4, const auto& o4, const auto& lse4,
                const auto& grad_q4, const auto& grad_k4, const auto& grad_v4) {
              core::attention_backward(view_of<const Scalar>(g4), view_of<const Scalar>(q4), view_of<const Scalar>(k4),
                                       view_of<const Scalar>(v4), view_of<const Scalar>(o4),
                                       view_of<const double>(lse4), view_of<Scalar>(grad_q4), view_of<Scalar>(grad_k4),
                                       view_of<Scalar>(grad_v4), {request.scale}, mask, TorchExecutor{});
            }(x...);
          });
        },
        0, grad_output, q, k, v, forward.output, forward.lse.unsqueeze(-1), grad.q, grad.k, grad.v);
  });
}

}  // namespace headroom::inline v0::detail
