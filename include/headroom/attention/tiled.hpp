#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "headroom/attention/backend.hpp"
#include "headroom/attention/positions.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/core/attention.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/operator.hpp"
#include "headroom/runtime/repetition.hpp"

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

/// Everything that the kernels read and write, [..., H, L, D] with the same batch dimensions; what is not there, or not
/// wanted, is undefined.
struct TiledTensors {
  torch::Tensor q, k, v, output = {}, lse = {};
  torch::Tensor bias = {}, mask = {}, block_mask = {}, slopes = {};
  torch::Tensor grad_output = {}, grad_lse = {}, grad_q = {}, grad_k = {}, grad_v = {}, grad_bias = {},
                grad_slopes = {};

  std::array<torch::Tensor*, 16> all() {
    return {&q,      &k,           &v,        &output, &lse,    &bias,   &mask,      &block_mask,
            &slopes, &grad_output, &grad_lse, &grad_q, &grad_k, &grad_v, &grad_bias, &grad_slopes};
  }
};

/// Named tensors, of which all() points to each, after a change of those that are defined.
template <class Tensors, class F>
Tensors each(Tensors tensors, F&& change) {
  for (torch::Tensor* x : tensors.all()) {
    if (x->defined()) *x = change(*x);
  }
  return tensors;
}

/// Whether one stride steps through the first two dimensions.
inline bool is_mergeable(const torch::Tensor& x) {
  return !x.defined() || x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
}

/// Calls f(4-D parts, first flat batch index) for named tensors with the same batch dimensions, of which `q` is one.
/// Batch dimensions that one stride can't step through are iterated over here; nothing is copied.
template <class Tensors, class F>
void for_each_4d(Tensors x, int64_t batch_index, F&& f) {
  if (x.q.dim() == 3) return f(each(x, [](const torch::Tensor& t) { return t.unsqueeze(0); }), batch_index);
  if (x.q.dim() == 4) return f(x, batch_index);
  if (std::ranges::all_of(x.all(), [](const torch::Tensor* t) { return is_mergeable(*t); })) {
    const auto merged = each(x, [](const torch::Tensor& t) {
      std::vector<int64_t> sizes = t.sizes().vec(), strides = t.strides().vec();
      if (sizes[1] == 1) strides[1] = strides[0];
      sizes[1] *= sizes[0];
      return t.as_strided(at::IntArrayRef(sizes).slice(1), at::IntArrayRef(strides).slice(1));
    });
    return for_each_4d(merged, batch_index, f);
  }
  int64_t inner = 1;
  for (int64_t d = 1; d < x.q.dim() - 3; ++d) inner *= x.q.size(d);
  const int64_t last = x.q.size(0) - 1;
  for (int64_t i = 0; i <= last; ++i) {
    // They need the same: in a dry run the second one stands for all that follow but the last
    const bool stands_for_all = is_dry(x.q) && i == 1 && last > 2;
    const Repetition repetition(stands_for_all ? static_cast<double>(last - 1) : 1);
    if (stands_for_all) i = last - 1;
    for_each_4d(each(x, [&](const torch::Tensor& t) { return t.select(0, i); }), batch_index + i * inner, f);
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

  /// q, k, v and the tensors of the request that have batch dimensions, expanded.
  TiledTensors tensors(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v) const {
    TiledTensors x{.q = q, .k = k, .v = v, .mask = request_.mask, .block_mask = request_.block_mask};
    if (request_.bias.defined()) x.bias = request_.expanded_bias();
    if (request_.alibi_slopes.defined()) x.slopes = request_.expanded_slopes().unsqueeze(-1);
    return x;
  }

  /// For the 4-D part of those tensors that starts at a flat batch index.
  core::AttentionParams params(const TiledTensors& part, int64_t batch_index) const {
    core::AttentionParams params{.scale = request_.scale,
                                 .softcap = request_.softcap,
                                 .query_offset = request_.query_offset,
                                 .bias = stored(part.bias),
                                 .slopes = stored(part.slopes),
                                 .mask = view_of<const bool>(part.mask),
                                 .mask_visible = request_.mask_visible,
                                 .block_mask = view_of<const bool>(part.block_mask),
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

  TiledParamGradients(const torch::Tensor& q, const AttentionRequest& request, const WantedGradients& wanted) {
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

  /// As the kernel adds to them; `part` is the 4-D part of those that have batch dimensions.
  core::AttentionParamGradients views(const TiledTensors& part, const AttentionRequest& request) const {
    core::AttentionParamGradients grads{.bias = stored(part.grad_bias), .slopes = view_of<double>(part.grad_slopes)};
    if (relative_bias.defined()) {
      grads.relative_bias = view_of<double>(relative_bias.expand({request.heads(), -1}).unsqueeze(0).unsqueeze(2));
    }
    if (sink.defined()) grads.sink = view_of<double>(sink.view({1, -1, 1, 1}));
    return grads;
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

/// The only functions that compile core's kernels, which takes about a minute.
HEADROOM_KERNEL AttentionForward tiled_attention(const AttentionInputs& in);

/// Writes the gradients of q, k and v into the tensors of `grad`, of their shapes with any strides, and adds those of
/// what is added to scores.
HEADROOM_KERNEL void tiled_attention_backward(const AttentionInputs& in, const AttentionForward& forward,
                                              const ResultGradients& results, const AttentionGradients& grad,
                                              const TiledParamGradients& param_grads);

#ifdef HEADROOM_DEFINE_KERNELS

HEADROOM_KERNEL AttentionForward tiled_attention(const AttentionInputs& in) {
  const torch::Tensor &q = in.q, &k = in.k, &v = in.v;
  const AttentionRequest& request = in.request;
  RECORD_FUNCTION("headroom::attention", operator_inputs({q, k, v}));
  std::vector<int64_t> sizes = q.sizes().vec();
  sizes.back() = v.size(-1);
  const torch::Tensor output = empty_in_order_of(q, sizes, q.options());
  sizes.pop_back();
  const torch::Tensor lse = torch::empty(sizes, q.options().dtype(torch::kDouble));
  const TiledRequest tiled(q, request);
  TiledTensors tensors = tiled.tensors(q, k, v);
  tensors.output = output, tensors.lse = lse.unsqueeze(-1);
  for_each_4d(tensors, 0, [&](const TiledTensors& x, int64_t batch) {
    with_element_type(q, [&](auto zero) {
      using T = decltype(zero);
      core::attention_forward<T>({.q = view_of<const T>(x.q),
                                  .k = view_of<const T>(x.k),
                                  .v = view_of<const T>(x.v),
                                  .output = view_of<T>(x.output),
                                  .lse = view_of<double>(x.lse)},
                                 tiled.params(x, batch), tiled.mask(batch), TorchExecutor{is_dry(q)});
    });
  });
  return {output, lse};
}

HEADROOM_KERNEL void tiled_attention_backward(const AttentionInputs& in, const AttentionForward& forward,
                                              const ResultGradients& results, const AttentionGradients& grad,
                                              const TiledParamGradients& param_grads) {
  const torch::Tensor &q = in.q, &k = in.k, &v = in.v;
  const AttentionRequest& request = in.request;
  RECORD_FUNCTION("headroom::attention_backward", operator_inputs({q, k, v}));
  const auto& scores = request.score_sizes;
  if (c10::multiply_integers(all_but_last(scores, 2)) == 0) {  // keys may be left that no query sees
    for (const torch::Tensor* x : {&grad.q, &grad.k, &grad.v}) x->zero_();
    return;
  }
  const TiledRequest tiled(q, request);
  TiledTensors tensors = tiled.tensors(q, k, v);
  tensors.output = forward.output, tensors.lse = forward.lse.unsqueeze(-1);
  tensors.grad_output = results.output;
  tensors.grad_q = grad.q, tensors.grad_k = grad.k, tensors.grad_v = grad.v;
  if (results.lse.defined()) tensors.grad_lse = results.lse.unsqueeze(-1);
  if (param_grads.bias.defined()) tensors.grad_bias = param_grads.bias.expand(scores);
  if (param_grads.slopes.defined()) {
    tensors.grad_slopes = param_grads.slopes.expand(all_but_last(scores, 1)).unsqueeze(-1);
  }
  for_each_4d(tensors, 0, [&](const TiledTensors& x, int64_t batch) {
    with_element_type(q, [&](auto zero) {
      using T = decltype(zero);
      core::attention_backward<T>({.q = view_of<const T>(x.q),
                                   .k = view_of<const T>(x.k),
                                   .v = view_of<const T>(x.v),
                                   .output = view_of<const T>(x.output),
                                   .lse = view_of<const double>(x.lse),
                                   .grad_output = view_of<const T>(x.grad_output),
                                   .grad_lse = view_of<const double>(x.grad_lse),
                                   .grad_q = view_of<T>(x.grad_q),
                                   .grad_k = view_of<T>(x.grad_k),
                                   .grad_v = view_of<T>(x.grad_v),
                                   .param_grads = param_grads.views(x, request)},
                                  tiled.params(x, batch), tiled.mask(batch), TorchExecutor{is_dry(q)});
    });
  });
}

#endif

}  // namespace headroom::inline v0::detail
