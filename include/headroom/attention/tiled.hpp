#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "headroom/attention/request.hpp"
#include "headroom/core/attention.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/operator.hpp"
#include "headroom/runtime/repetition.hpp"

#ifdef HEADROOM_SEPARATE_KERNELS
#define HEADROOM_KERNEL
#else
#define HEADROOM_KERNEL inline
#endif

namespace headroom::inline v0::detail {

/// LibTorch's thread pool and allocator behind core's executor: at::set_num_threads counts, and so does the workspace
/// wherever LibTorch's memory is counted. In a dry run it allocates and runs nothing.
struct TorchExecutor {
  bool dry = false;

  struct Workspace {
    torch::Tensor bytes;
    std::unique_ptr<std::byte[]> host;  // in a dry run: the kernels initialise some of it
    std::byte* data() const { return host ? host.get() : static_cast<std::byte*>(bytes.mutable_data_ptr()); }
  };

  int workers() const { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
  Workspace allocate(core::Index bytes) const {
    return {workspace_tensor(bytes, torch::kByte), dry ? std::make_unique<std::byte[]>(bytes) : nullptr};
  }
  template <class Body>
  void run(core::Index tasks, Body&& body) const {
    if (dry) return;
    std::atomic<core::Index> next{0};
    at::parallel_for(0, workers(), 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        for (core::Index task; (task = next++) < tasks;) body(task, static_cast<int>(worker));
      }
    });
  }
};

/// An uninitialised tensor of shape `sizes` whose dimensions lie in memory in the order of those of `like`, without
/// gaps: the output of attention over a permuted view can be permuted back and reshaped for free. Not a view, so that
/// what a custom Function returns of it may be changed in place.
inline torch::Tensor empty_in_order_of(const torch::Tensor& like, c10::SymIntArrayRef sizes,
                                       const torch::TensorOptions& options) {
  const c10::SymIntArrayRef of_like = like.sym_strides();
  std::vector<int64_t> inner_first(like.dim());
  std::iota(inner_first.rbegin(), inner_first.rend(), 0);
  std::stable_sort(inner_first.begin(), inner_first.end(),
                   [&](int64_t a, int64_t b) { return of_like[a] < of_like[b]; });
  std::vector<c10::SymInt> strides(like.dim());
  c10::SymInt elements = 1;
  for (const int64_t dim : inner_first) {
    strides[dim] = elements;
    elements = elements * sizes[dim];
  }
  return at::empty_strided_symint(sizes, strides, options);
}
inline torch::Tensor empty_in_order_of(const torch::Tensor& like, at::IntArrayRef sizes,
                                       const torch::TensorOptions& options) {
  return empty_in_order_of(like, c10::SymIntArrayRef(c10::fromIntArrayRefSlow(sizes)), options);
}

/// Whether the dimensions of x lie in memory as those of empty_in_order_of(like, x.sizes(), …) would.
inline bool lies_in_order_of(const torch::Tensor& like, const torch::Tensor& x) {
  std::vector<int64_t> order(like.dim());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater(), [&](int64_t d) { return like.stride(d); });
  int64_t dense = 1;
  for (size_t i = order.size(); i-- > 0; dense *= x.size(order[i])) {
    if (x.size(order[i]) != 1 && x.stride(order[i]) != dense) return false;
  }
  return true;
}

/// Calls f(4-D parts, first flat batch index) for tensors [..., *, *, *] of equal batch dimensions; undefined ones stay
/// undefined. Batch dimensions that one stride can't step through are iterated over here; nothing is copied.
template <class F>
void for_each_4d(const std::vector<torch::Tensor>& x, int64_t batch_index, F&& f) {
  const auto parts = [&](auto&& change) {
    std::vector<torch::Tensor> changed;
    for (const torch::Tensor& t : x) changed.push_back(t.defined() ? change(t) : t);
    return changed;
  };
  const torch::Tensor& first = x.front();
  if (first.dim() == 3) return f(parts([](const torch::Tensor& t) { return t.unsqueeze(0); }), batch_index);
  if (first.dim() == 4) return f(x, batch_index);
  const bool mergeable = std::all_of(x.begin(), x.end(), [](const torch::Tensor& t) {
    return !t.defined() || t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.size(1) * t.stride(1);
  });
  if (mergeable) {
    const auto merged = parts([](const torch::Tensor& t) {
      std::vector<int64_t> sizes = t.sizes().vec(), strides = t.strides().vec();
      if (sizes[1] == 1) strides[1] = strides[0];
      sizes[1] *= sizes[0];
      return t.as_strided(at::IntArrayRef(sizes).slice(1), at::IntArrayRef(strides).slice(1));
    });
    return for_each_4d(merged, batch_index, f);
  }
  int64_t inner = 1;
  for (int64_t d = 1; d < first.dim() - 3; ++d) inner *= first.size(d);
  const int64_t last = first.size(0) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    // They need the same: in a dry run the second one stands for all that follow but the last
    const bool stands_for_all = is_dry(first) && i == 1 && last > 2;
    const Repetition repetition(stands_for_all ? static_cast<double>(last - 1) : 1);
    if (stands_for_all) i = last - 1;
    for_each_4d(parts([&](const torch::Tensor& t) { return t.select(0, i); }), batch_index + i * inner, f);
  }
}

template <class Scalar>
core::TensorView<Scalar> view_of(const torch::Tensor& x) {
  if (!x.defined()) return {};
  // Without data there is nothing to point to, but the tensor is there
  void* const data =
      is_dry(x) ? reinterpret_cast<void*>(alignof(std::max_align_t)) : const_cast<void*>(x.const_data_ptr());
  core::TensorView<Scalar> view{static_cast<Scalar*>(data), {}, {}};
  std::copy_n(x.sizes().begin(), 4, view.shape.begin());
  std::copy_n(x.strides().begin(), 4, view.strides.begin());
  return view;
}

/// Calls f(T()) for the element type of x.
template <class F>
void with_element_type(const torch::Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case torch::kDouble:
      return f(double());
    case torch::kBFloat16:
      return f(Eigen::bfloat16());
    case torch::kHalf:
      return f(Eigen::half());
    default:
      return f(float());
  }
}
inline core::StoredTensor stored(const torch::Tensor& x) {
  core::StoredTensor tensor;
  if (x.defined()) with_element_type(x, [&](auto zero) { tensor = view_of<const decltype(zero)>(x); });
  return tensor;
}

/// The dtype that tensors like x are computed in.
inline torch::ScalarType compute_type(const torch::Tensor& x) {
  return x.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
}

/// A request as the kernel takes it. Its tensors are views of the request's, or O(L) in size.
class TiledRequest {
 public:
  TiledRequest(const torch::Tensor& q, const AttentionRequest& request) : request_(request) {
    if (packed()) positions_.emplace(request);
    if (!request.rotary.defined()) return;
    const auto complex = compute_type(q) == torch::kDouble ? torch::kComplexDouble : torch::kComplexFloat;
    rotary_ = torch::view_as_real(request.rotary.resolve_conj().resolve_neg().to(complex).contiguous())
                  .flatten(-2)
                  .unsqueeze(0)
                  .unsqueeze(0);
    if (packed()) rows_.emplace(request);
  }

  /// The tensors that have batch dimensions: bias, mask, block mask and slopes, expanded.
  std::vector<torch::Tensor> batched() const {
    const auto expanded = [](const torch::Tensor& x, auto&& view) { return x.defined() ? view() : torch::Tensor(); };
    return {expanded(request_.bias, [&] { return request_.expanded_bias(); }), request_.mask, request_.block_mask,
            expanded(request_.alibi_slopes, [&] { return request_.expanded_slopes().unsqueeze(-1); })};
  }

  /// For the 4-D part of those tensors that starts at a flat batch index.
  core::AttentionParams params(at::TensorList part, int64_t batch_index) const {
    core::AttentionParams params{.scale = request_.scale,
                                 .softcap = request_.softcap,
                                 .query_offset = request_.query_offset,
                                 .bias = stored(part[0]),
                                 .slopes = stored(part[3]),
                                 .mask = view_of<const bool>(part[1]),
                                 .mask_visible = request_.mask_visible,
                                 .block_mask = view_of<const bool>(part[2]),
                                 .block_size = request_.block_size,
                                 .rotary = stored(rotary_),
                                 .dropout = request_.dropout,
                                 .first_head = batch_index * request_.heads()};
    if (packed()) params.query_positions = pointer(positions_->query);
    if (rows_.has_value()) {
      params.rotary_query_rows = pointer(rows_->query);
      params.rotary_key_rows = pointer(rows_->key);
    }
    if (request_.relative_bias.defined()) {
      params.relative_bias = stored(request_.expanded_relative_bias().unsqueeze(0).unsqueeze(2));
    }
    if (request_.sink.defined()) params.sink = stored(request_.sink.view({1, -1, 1, 1}));
    return params;
  }

  /// Which keys a query sees by its position and by the lengths of its batch.
  struct Mask {
    core::WindowMask window;
    const int64_t *begin, *end;  // where sequences are packed, instead of the window
    const int64_t* lengths;
    core::KeyRange keys(core::Index b, core::Index h, core::Index query) const {
      core::KeyRange range = begin == nullptr ? window.keys(b, h, query) : core::KeyRange{begin[query], end[query]};
      if (lengths != nullptr) range.end = std::min<core::Index>(range.end, lengths[b]);
      return range;
    }
  };
  Mask mask(int64_t batch_index) const {
    return {{request_.window_left, request_.causal ? 0 : request_.window_right, request_.query_offset},
            packed() ? pointer(positions_->begin) : nullptr,
            packed() ? pointer(positions_->end) : nullptr,
            request_.key_lengths.defined() ? pointer(request_.key_lengths) + batch_index : nullptr};
  }

 private:
  bool packed() const { return request_.sequence_starts.defined(); }
  static const int64_t* pointer(const torch::Tensor& x) { return x.const_data_ptr<int64_t>(); }

  const AttentionRequest& request_;
  std::optional<AttentionPositions> positions_;
  std::optional<RotaryRows> rows_;
  torch::Tensor rotary_;  // [1,1,rows,2·pairs]
};

/// Gradients of what is added to scores. That of a narrow bias is summed up tile by tile and rounded once; only where
/// several calls of the kernel add to it, in what is computed in.
struct TiledParamGradients {
  torch::Tensor bias, relative_bias, slopes, sink;  // of the shapes of the request's; undefined: not wanted

  /// `wanted` as in AttentionFunction.
  TiledParamGradients(const torch::Tensor& q, const AttentionRequest& request, const std::array<bool, 7>& wanted) {
    const auto zeros = [](bool is_wanted, const torch::Tensor& x, torch::ScalarType dtype) {
      return is_wanted && x.defined() ? torch::zeros(x.sizes(), x.options().dtype(dtype)) : torch::Tensor();
    };
    const bool one_call = q.dim() <= 4,
               narrow = request.bias.defined() && request.bias.itemsize() < elementSize(compute_type(q));
    bias = zeros(wanted[3], request.bias, one_call && narrow ? request.bias.scalar_type() : compute_type(q));
    relative_bias = zeros(wanted[4], request.relative_bias, torch::kDouble);
    slopes = zeros(wanted[5], request.alibi_slopes, torch::kDouble);
    sink = zeros(wanted[6], request.sink, torch::kDouble);
  }

  /// As gradients, in the dtypes of what they belong to.
  void store(AttentionGradients& grad, const AttentionRequest& request) const {
    const auto like = [](const torch::Tensor& sum, const torch::Tensor& x) {
      return sum.defined() ? sum.to(x.scalar_type()) : sum;
    };
    grad.bias = like(bias, request.bias);
    grad.relative_bias = like(relative_bias, request.relative_bias);
    grad.alibi_slopes = like(slopes, request.alibi_slopes);
    grad.sink = like(sink, request.sink);
  }
};

/// The only functions that compile the kernels, which takes about a minute. With HEADROOM_SEPARATE_KERNELS defined they
/// are just declared, and one unit of the program, which also defines HEADROOM_KERNELS_HERE, holds them.
HEADROOM_KERNEL AttentionForward tiled_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                                 const AttentionRequest& request);

/// Writes the gradients of q, k and v into tensors of their shapes, with any strides, and adds those of what is added
/// to scores. `grad_lse` may be undefined.
HEADROOM_KERNEL void tiled_attention_backward(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                                              const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                              const AttentionForward& forward, const AttentionRequest& request,
                                              const AttentionGradients& grad, const TiledParamGradients& param_grads);

#if !defined(HEADROOM_SEPARATE_KERNELS) || defined(HEADROOM_KERNELS_HERE)

HEADROOM_KERNEL AttentionForward tiled_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                                 const AttentionRequest& request) {
  RECORD_FUNCTION("headroom::attention", operator_inputs({q, k, v}));
  std::vector<int64_t> sizes = q.sizes().vec();
  sizes.back() = v.size(-1);
  const torch::Tensor output = empty_in_order_of(q, sizes, q.options());
  sizes.pop_back();
  const torch::Tensor lse = torch::empty(sizes, q.options().dtype(torch::kDouble));
  const TiledRequest tiled(q, request);
  std::vector<torch::Tensor> tensors{q, k, v, output, lse.unsqueeze(-1)};
  for (torch::Tensor& x : tiled.batched()) tensors.push_back(std::move(x));
  for_each_4d(tensors, 0, [&](at::TensorList x, int64_t batch) {
    with_element_type(q, [&](auto zero) {
      using T = decltype(zero);
      core::attention_forward<T>(view_of<const T>(x[0]), view_of<const T>(x[1]), view_of<const T>(x[2]),
                                 view_of<T>(x[3]), view_of<double>(x[4]), tiled.params(x.slice(5), batch),
                                 tiled.mask(batch), TorchExecutor{is_dry(q)});
    });
  });
  return {output, lse};
}

HEADROOM_KERNEL void tiled_attention_backward(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                                              const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                              const AttentionForward& forward, const AttentionRequest& request,
                                              const AttentionGradients& grad, const TiledParamGradients& param_grads) {
  RECORD_FUNCTION("headroom::attention_backward", operator_inputs({q, k, v}));
  const auto& scores = request.score_sizes;
  if (c10::multiply_integers(all_but_last(scores, 2)) == 0) {  // keys may be left that no query sees
    for (const torch::Tensor* x : {&grad.q, &grad.k, &grad.v}) x->zero_();
    return;
  }
  const TiledRequest tiled(q, request);
  std::vector<torch::Tensor> tensors{grad_output,
                                     q,
                                     k,
                                     v,
                                     forward.output,
                                     forward.lse.unsqueeze(-1),
                                     grad.q,
                                     grad.k,
                                     grad.v,
                                     grad_lse.defined() ? grad_lse.unsqueeze(-1) : grad_lse,
                                     param_grads.bias.defined() ? param_grads.bias.expand(scores) : torch::Tensor(),
                                     param_grads.slopes.defined()
                                         ? param_grads.slopes.expand(all_but_last(scores, 1)).unsqueeze(-1)
                                         : torch::Tensor()};
  for (torch::Tensor& x : tiled.batched()) tensors.push_back(std::move(x));
  for_each_4d(tensors, 0, [&](at::TensorList x, int64_t batch) {
    with_element_type(q, [&](auto zero) {
      using T = decltype(zero);
      core::AttentionParamGradients params{stored(x[10]), {}, view_of<double>(x[11]), {}};
      if (param_grads.relative_bias.defined()) {
        params.relative_bias =
            view_of<double>(param_grads.relative_bias.expand({request.heads(), -1}).unsqueeze(0).unsqueeze(2));
      }
      if (param_grads.sink.defined()) params.sink = view_of<double>(param_grads.sink.view({1, -1, 1, 1}));
      core::attention_backward<T>(view_of<const T>(x[0]), view_of<const T>(x[1]), view_of<const T>(x[2]),
                                  view_of<const T>(x[3]), view_of<const T>(x[4]), view_of<const double>(x[5]),
                                  view_of<T>(x[6]), view_of<T>(x[7]), view_of<T>(x[8]),
                                  tiled.params(x.slice(12), batch), tiled.mask(batch), TorchExecutor{is_dry(q)}, params,
                                  view_of<const double>(x[9]));
    });
  });
}

#endif  // kernels

#undef HEADROOM_KERNEL

}  // namespace headroom::inline v0::detail
