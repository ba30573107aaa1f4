#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headroom/attention/backend.hpp"
#include "headroom/attention/positions.hpp"
#include "headroom/attention/request.hpp"
#include "headroom/attention/tiled_tensors.hpp"
#include "headroom/core/attention.hpp"
#include "headroom/core/separate_kernels.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/operator.hpp"

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

/// A request as the kernel takes it. Its tensors are views of the request's, or O(L) in size.
class TiledRequest {
 public:
  TiledRequest(const torch::Tensor& q, const AttentionRequest& request) : request_(request) {
    if (packed()) positions_.emplace(request);
    int64_t first = 0;
    for (const auto& [rows, columns] : request.score_table_shapes) {
      const core::StoredTensor table =
          stored(request.score_tables.narrow(0, first, rows * columns).view({1, 1, rows, columns}));
      score_tables_.push_back({table.data, table.type, rows, columns});
      first += rows * columns;
    }
    const auto wide = compute_type(q);
    if (request.rotary.defined()) {
      const auto complex = wide == torch::kDouble ? torch::kComplexDouble : torch::kComplexFloat;
      rotary_ = torch::view_as_real(request.rotary.resolve_conj().resolve_neg().to(complex).contiguous())
                    .flatten(-2)
                    .unsqueeze(0)
                    .unsqueeze(0);
    }
    if (request.polar.defined()) polar_ = request.polar.to(wide).contiguous().unsqueeze(0).unsqueeze(0);
    if (request.polar_phase.defined()) {
      const torch::Tensor phase = request.polar_phase.detach().to(torch::kDouble);
      phase_ = torch::cat({phase.cos(), phase.sin()}, -1).to(wide).unsqueeze(1).unsqueeze(0);
    }
    if (packed() && (rotary_.defined() || polar_.defined())) rows_.emplace(request);
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
                                 .polar = stored(polar_),
                                 .polar_phase = stored(phase_),
                                 .dropout = request_.dropout,
                                 .first_head = batch_index * request_.heads()};
    if (packed()) params.query_positions = pointer(positions_->query);
    if (rows_.has_value()) {
      params.query_table_rows = pointer(rows_->query);
      params.key_table_rows = pointer(rows_->key);
    }
    if (request_.relative_bias.defined()) {
      params.relative_bias = stored(request_.expanded_relative_bias().unsqueeze(0).unsqueeze(2));
    }
    if (request_.score_function.has_value()) params.score_function = request_.score_function->ref(score_tables_);
    if (request_.mask_function.has_value()) params.mask_function = request_.mask_function->ref();
    if (request_.sink.defined()) params.sink = stored(request_.sink.view({1, -1, 1, 1}));
    return params;
  }

  /// f(mask): which ranges of keys a query sees by its position, by the lengths of its batch and by a mask function.
  template <class F>
  void with_mask(int64_t batch_index, F&& f) const {
    const auto packed_range = [&](size_t r) { return packed() ? positions_->ranges[r].mask() : core::RangeMask{}; };
    const Mask mask{request_.position_mask(request_.query_offset), packed_range(0),
                    request_.key_lengths.defined() ? pointer(request_.key_lengths) + batch_index : nullptr,
                    request_.mask_function.has_value() ? &*request_.mask_function : nullptr, batch_index};
    if (request_.global_keys > 0) {
      f(MaskWithGlobalKeys{mask, packed_range(1)});
    } else {
      f(mask);
    }
  }

 private:
  struct Mask {
    decltype(std::declval<AttentionRequest>().position_mask(0)) of_positions;
    core::RangeMask packed;   // instead, where sequences are
    const int64_t* lengths;   // [B], or null
    const MaskFunction* own;  // or null
    int64_t first_batch;      // of the function

    core::KeyRange limited(core::Index b, core::Index h, core::Index query, core::KeyRange range) const {
      if (own != nullptr) range = range & own->keys(first_batch + b, h, query);
      return {range.begin, lengths == nullptr ? range.end : std::min<core::Index>(range.end, lengths[b])};
    }
    core::KeyRange keys(core::Index b, core::Index h, core::Index query) const {
      return limited(b, h, query, packed.begin == nullptr ? of_positions.keys(b, h, query) : packed.keys(b, h, query));
    }
  };
  struct MaskWithGlobalKeys : Mask {
    core::RangeMask other_packed;

    core::KeyRange other_keys(core::Index b, core::Index h, core::Index query) const {
      return limited(b, h, query,
                     packed.begin == nullptr ? of_positions.other_keys(b, h, query) : other_packed.keys(b, h, query));
    }
  };

  bool packed() const { return request_.sequence_starts.defined(); }
  static const int64_t* pointer(const torch::Tensor& x) { return x.const_data_ptr<int64_t>(); }

  const AttentionRequest& request_;
  std::optional<AttentionPositions> positions_;
  std::optional<TableRows> rows_;
  torch::Tensor rotary_;         // [1,1,rows,2·pairs]
  torch::Tensor polar_, phase_;  // [1,1,rows,2D], [1,Hk,1,2D]
  std::vector<core::ScoreTable> score_tables_;
};

/// Gradients of what is added to scores. That of a narrow bias is summed up tile by tile and rounded once; only where
/// several calls of the kernel add to it, in what is computed in.
struct TiledParamGradients {
  torch::Tensor bias, relative_bias, slopes, sink, score_tables,
      polar_phase;  // of the shapes of the request's; undefined: not wanted

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
    score_tables = zeros(wanted[7], request.score_tables, torch::kDouble);
    polar_phase = zeros(wanted[8], request.polar_phase, torch::kDouble);
  }

  /// As the kernel adds to them; `part` is the 4-D part of those that have batch dimensions.
  core::AttentionParamGradients views(const TiledTensors& part, const AttentionRequest& request) const {
    core::AttentionParamGradients grads{.bias = stored(part.grad_bias), .slopes = view_of<double>(part.grad_slopes)};
    if (relative_bias.defined()) {
      grads.relative_bias = view_of<double>(relative_bias.expand({request.heads(), -1}).unsqueeze(0).unsqueeze(2));
    }
    if (sink.defined()) grads.sink = view_of<double>(sink.view({1, -1, 1, 1}));
    if (score_tables.defined()) grads.score_tables = view_of<double>(score_tables.view({1, 1, 1, -1}));
    if (polar_phase.defined()) grads.polar_phase = view_of<double>(polar_phase.unsqueeze(1).unsqueeze(0));
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
    grad.score_tables = like(score_tables, request.score_tables);
    grad.polar_phase = like(polar_phase, request.polar_phase);
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
      const core::AttentionTensors<T> views{.q = view_of<const T>(x.q),
                                            .k = view_of<const T>(x.k),
                                            .v = view_of<const T>(x.v),
                                            .output = view_of<T>(x.output),
                                            .lse = view_of<double>(x.lse)};
      tiled.with_mask(batch, [&](const auto& mask) {
        core::attention_forward(views, tiled.params(x, batch), mask, TorchExecutor{is_dry(q)});
      });
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
      const core::AttentionBackwardTensors<T> views{.q = view_of<const T>(x.q),
                                                    .k = view_of<const T>(x.k),
                                                    .v = view_of<const T>(x.v),
                                                    .output = view_of<const T>(x.output),
                                                    .lse = view_of<const double>(x.lse),
                                                    .grad_output = view_of<const T>(x.grad_output),
                                                    .grad_lse = view_of<const double>(x.grad_lse),
                                                    .grad_q = view_of<T>(x.grad_q),
                                                    .grad_k = view_of<T>(x.grad_k),
                                                    .grad_v = view_of<T>(x.grad_v),
                                                    .param_grads = param_grads.views(x, request)};
      tiled.with_mask(batch, [&](const auto& mask) {
        core::attention_backward(views, tiled.params(x, batch), mask, TorchExecutor{is_dry(q)});
      });
    });
  });
}

#endif

}  // namespace headroom::inline v0::detail
