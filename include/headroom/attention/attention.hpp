#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <functional>

#include "headroom/attention/checks.hpp"
#include "headroom/attention/chunked.hpp"
#include "headroom/attention/fused.hpp"
#include "headroom/attention/merge.hpp"
#include "headroom/attention/reference.hpp"
#include "headroom/attention/tiled.hpp"
#include "headroom/runtime/operator.hpp"

namespace headroom::inline v0 {

namespace detail {

/// What a backend can't serve of a request, by the names of the options.
inline std::vector<std::string> refusals(AttentionBackend backend, const torch::Tensor& q,
                                         const AttentionRequest& request) {
  std::vector<std::string> names;
  const auto refuse = [&](bool asked, const std::string& name) {
    if (asked) names.push_back(name);
  };
  if (backend == AttentionBackend::tiled) {
    refuse(!compute_device(q).is_cpu(), "tensors on " + compute_device(q).str());
    const auto dtype = q.scalar_type();
    refuse(dtype != torch::kFloat && dtype != torch::kDouble && dtype != torch::kBFloat16 && dtype != torch::kHalf,
           "tensors of " + std::string(q.dtype().name()));
  }
  if (backend == AttentionBackend::fused) {
    const auto device = compute_device(q);
    refuse(!device.is_cpu() && !device.is_cuda(), "tensors on " + device.str());
    refuse(device.is_cuda() && q.scalar_type() == torch::kDouble, "double on " + device.str());
    // Seen on an H200: NaN; and gradients of q and k that are off by 0.2, from memory-efficient attention in 16 bits. A
    // likely cause of those is mended in FusedAttention, which has not met a GPU since
    const bool narrow_on_cuda = device.is_cuda() && q.scalar_type() != torch::kFloat;
    refuse(device.is_cuda() && request.scale <= 0, "a scale of 0 or less on " + device.str());
    refuse(narrow_on_cuda && request.causal && request.queries() != request.keys(),
           "causal with more or fewer keys than queries in 16 bits on " + device.str());
    refuse(narrow_on_cuda && request.bias.defined(), "bias in 16 bits on " + device.str());
    refuse(q.size(-1) == 0 || c10::multiply_integers(request.score_sizes) == 0, "empty tensors");
    refuse(request.group() > 1, "fewer heads of k and v than of q");
    refuse(request.causal && request.query_offset != 0, "query_offset with causal");
    refuse(request.causal && request.scale <= 0 && device.is_cpu(), "causal with a scale of 0 or less");  // NaN
    refuse(request.window_left >= 0 || request.window_right >= 0, "window");
    refuse(request.key_lengths.defined(), "key_lengths");
    refuse(request.sequence_starts.defined(), "sequence_starts");
    refuse(request.mask.defined(), request.mask_visible ? "mask" : "hidden");
    refuse(request.block_mask.defined(), "block_mask");
    if (request.bias.defined()) {
      refuse(request.bias.requires_grad() && torch::GradMode::is_enabled(), "bias with a gradient");
      refuse(!takes_bias(q, request), "a bias of this dtype or layout");
    }
    refuse(request.relative_bias.defined(), "relative_bias");
    refuse(request.alibi_slopes.defined(), "alibi_slopes");
    refuse(request.sink.defined(), "sink");
    refuse(request.softcap > 0, "softcap");
    refuse(request.rotary.defined(), "rotary");
    refuse(request.dropout.active(), "dropout");
  }
  return names;
}

/// The backend that `automatic` stands for; fails when the named one can't serve the request.
inline AttentionBackend resolve_backend(const torch::Tensor& q, const AttentionRequest& request,
                                        AttentionBackend wanted) {
  if (wanted == AttentionBackend::automatic) {
    const auto best = compute_device(q).is_cpu() ? AttentionBackend::tiled : AttentionBackend::fused;
    wanted = refusals(best, q, request).empty() ? best : AttentionBackend::chunked;
  }
  const auto listed = [](const auto& names) {
    std::ostringstream text;
    for (size_t i = 0; i < names.size(); ++i) text << (i == 0 ? "" : ", ") << names[i];
    return text.str();
  };
  const auto refused = refusals(wanted, q, request);
  if (refused.empty()) return wanted;
  std::vector<AttentionBackend> able;
  for (const auto backend :
       {AttentionBackend::tiled, AttentionBackend::fused, AttentionBackend::chunked, AttentionBackend::reference}) {
    if (refusals(backend, q, request).empty()) able.push_back(backend);
  }
  fail("headroom.attention.backend", "the backend ", wanted, " does not serve ", listed(refused),
       "; leave that out or ask for one of the backends ", listed(able));
}

// ---- autograd ----

/// A request without its tensors, in an autograd context.
struct SavedRequest : torch::CustomClassHolder {
  explicit SavedRequest(AttentionRequest r) : request(std::move(r)) {
    for (torch::Tensor* x : request.tensors()) *x = torch::Tensor();
  }
  AttentionRequest request;
};

/// Keeps a request for the backward pass; its tensors are for the caller to save.
inline void save_request(torch::autograd::AutogradContext* ctx, const AttentionRequest& request) {
  ctx->saved_data["request"] = c10::IValue::make_capsule(c10::make_intrusive<SavedRequest>(request));
}

/// The request, with its tensors from `tensors`.
inline AttentionRequest saved_request(torch::autograd::AutogradContext* ctx, at::TensorList tensors) {
  const auto holder = ctx->saved_data["request"].toCapsule();
  AttentionRequest request = static_cast<const SavedRequest&>(*holder).request;
  for (size_t i = 0; i < tensors.size(); ++i) *request.tensors()[i] = tensors[i];
  return request;
}

/// Gradients as a function of their own, so that differentiating them fails instead of being silently wrong.
struct FirstDerivatives : torch::autograd::Function<FirstDerivatives> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, at::TensorList,
                                                const std::function<torch::autograd::variable_list()>& compute) {
    return compute();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    fail("headroom.attention.double_backward",
         "second derivatives of attention are only served by the backend reference; call backward without "
         "create_graph, or use that backend");
  }
};

/// compute() where the result depends on `inputs`; some of them and of the results may be undefined.
inline torch::autograd::variable_list first_derivatives(
    const torch::autograd::variable_list& inputs, const std::function<torch::autograd::variable_list()>& compute) {
  torch::autograd::variable_list defined, grads;
  for (const torch::Tensor& x : inputs) {
    if (x.defined()) defined.push_back(x);
  }
  const auto computed = FirstDerivatives::apply(at::TensorList(defined), [&] {
    torch::autograd::variable_list results;
    grads = compute();
    for (const torch::Tensor& x : grads) {
      if (x.defined()) results.push_back(x);
    }
    return results;
  });
  auto next = computed.begin();
  for (torch::Tensor& x : grads) {
    if (x.defined()) x = *next++;
  }
  return grads;
}

/// The result of an attention kernel: compute()'s, or what a selective checkpoint has kept of it.
template <class Compute>
AttentionForward attention_result(Compute&& compute) {
  auto results = OperatorResults::of("headroom::attention", [&] {
    AttentionForward computed = compute();
    std::vector<torch::Tensor> list{std::move(computed.output), std::move(computed.lse)};
    list.insert(list.end(), computed.extra.begin(), computed.extra.end());
    return list;
  });
  return {results[0], results[1], {results.begin() + 2, results.end()}};
}

/// Attention of a backend with a backward pass of its own:
///   AttentionForward   forward(q, k, v, request)
///   AttentionGradients backward(grad_output, grad_lse or undefined, q, k, v, forward, request, wanted)
/// where `wanted` says for q, k, v, bias, relative_bias, alibi_slopes and sink whose gradient is asked for.
template <class Backend>
struct AttentionFunction : torch::autograd::Function<AttentionFunction<Backend>> {
  using Optional = std::optional<torch::Tensor>;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const torch::Tensor& q,
                                                const torch::Tensor& k, const torch::Tensor& v, const Optional&,
                                                const Optional&, const Optional&, const Optional&,
                                                AttentionRequest request) {
    const AttentionForward result = attention_result([&] { return Backend::forward(q, k, v, request); });
    torch::autograd::variable_list saved{q, k, v};
    for (const torch::Tensor* x : request.tensors()) saved.push_back(*x);
    saved.insert(saved.end(), {result.output, result.lse});
    saved.insert(saved.end(), result.extra.begin(), result.extra.end());
    ctx->save_for_backward(std::move(saved));
    save_request(ctx, request);
    ctx->set_materialize_grads(false);
    if (!Backend::kDifferentiableLse) ctx->mark_non_differentiable({result.lse});
    return {result.output, result.lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    const auto saved = ctx->get_saved_variables();
    const at::TensorList all(saved);
    const AttentionRequest request = saved_request(ctx, all.slice(3, 7));
    const torch::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &output = saved[10], &lse = saved[11];
    std::array<bool, 7> wanted{};
    for (size_t i = 0, edge = 0; i < wanted.size(); ++i)
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    torch::autograd::variable_list inputs = all.slice(0, 7).vec();
    inputs.insert(inputs.end(), grad.begin(), grad.end());
    auto grads = first_derivatives(inputs, [&]() -> torch::autograd::variable_list {
      const torch::Tensor grad_output = grad[0].defined() ? grad[0].resolve_neg() : torch::zeros_like(output);
      const AttentionForward result{output, lse, all.slice(12).vec()};
      const torch::Tensor grad_lse = grad[1].defined() ? grad[1].resolve_neg() : grad[1];
      AttentionGradients g = Backend::backward(grad_output, grad_lse, q, k, v, result, request, wanted);
      return {g.q, g.k, g.v, g.bias, g.relative_bias, g.alibi_slopes, g.sink};
    });
    grads.emplace_back();  // the request has no gradient
    return grads;
  }

  static AttentionForward run(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                              const AttentionRequest& request) {
    const auto given = [](const torch::Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; };
    const auto results =
        AttentionFunction::apply(q, k, v, given(request.bias), given(request.relative_bias),
                                 given(request.alibi_slopes), given(request.sink), AttentionRequest(request));
    return {results[0], results[1]};
  }
};

struct TiledBackend {
  static constexpr bool kDifferentiableLse = true;

  static AttentionForward forward(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                  const AttentionRequest& request) {
    return tiled_attention(q, k, v, request);
  }
  static AttentionGradients backward(const torch::Tensor& grad_output, const torch::Tensor& grad_lse,
                                     const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                     const AttentionForward& forward, const AttentionRequest& request,
                                     const std::array<bool, 7>& wanted) {
    AttentionGradients grad{empty_in_order_of(q, q.sizes(), q.options()), empty_in_order_of(k, k.sizes(), k.options()),
                            empty_in_order_of(v, v.sizes(), v.options())};
    const TiledParamGradients sums(q, request, wanted);
    tiled_attention_backward({q, k, v, forward, grad_output, grad_lse}, request, grad, sums);
    sums.store(grad, request);
    return grad;
  }
};

/// k or v with the batch dimensions of q, as a view.
inline torch::Tensor with_batch_of(const torch::Tensor& q, const torch::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  std::copy(q.sizes().begin(), q.sizes().end() - 3, sizes.begin());
  return x.expand(sizes);
}

/// The log-sum-exp is in double; it may be undefined unless wanted.
HEADROOM_KERNEL AttentionForward run_backend(const torch::Tensor& given_q, const torch::Tensor& given_k,
                                             const torch::Tensor& given_v, const AttentionOptions& options,
                                             bool with_lse);

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL AttentionForward run_backend(const torch::Tensor& given_q, const torch::Tensor& given_k,
                                             const torch::Tensor& given_v, const AttentionOptions& options,
                                             bool with_lse) {
  const auto request = AttentionRequest::check(given_q, given_k, given_v, options);
  // The imaginary part of a conjugate has its minus sign beside its memory
  const torch::Tensor q = given_q.resolve_neg(), k = given_k.resolve_neg(), v = given_v.resolve_neg();
  switch (resolve_backend(q, request, options.backend())) {
    case AttentionBackend::tiled:
      // The kernel steps through one batch dimension: with more, keys that batches share are expanded, not copied.
      return q.dim() <= 4 ? AttentionFunction<TiledBackend>::run(q, k, v, request)
                          : AttentionFunction<TiledBackend>::run(q, with_batch_of(q, k), with_batch_of(q, v), request);
    case AttentionBackend::fused:
      return AttentionFunction<FusedBackend>::run(q, with_batch_of(q, k), with_batch_of(q, v), request);
    case AttentionBackend::chunked:
      return AttentionFunction<ChunkedBackend>::run(q, k, v, request);
    default:
      return reference_attention(q, k, v, request, with_lse, compute_type(q));
  }
}
#endif

/// The log-sum-exp is undefined unless wanted.
inline AttentionResult run_attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                     const AttentionOptions& options, bool with_lse) {
  const AttentionForward result = run_backend(q, k, v, options, with_lse);
  return {result.output.to(q.scalar_type()), with_lse ? result.lse.to(compute_type(q)) : torch::Tensor()};
}

}  // namespace detail

/// softmax(softcap(scale·q·kᵀ) + what is added to scores, over the allowed keys)·v, as AttentionOptions define it;
/// differentiable in q, k, v, bias, relative_bias, alibi_slopes and sink.
/// q [..., H, Lq, D], k [..., Hk, Lk, D], v [..., Hk, Lk, Dv]: three dimensions or more, any strides, floating-point
/// dtype (computed in float, in double for double). Head h of q attends to head h·Hk/H of k and v; their batch
/// dimensions broadcast to those of q. The output lies in memory in the order of q's dimensions. A query without keys
/// gets output 0 and gradient 0. Saved for backward: q, k, v, output and the log-sum-exp. Throws
/// headroom.attention.*, and .double_backward for second derivatives unless the backend is reference.
inline torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                               const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/false).output;
}

/// The same with the log-sum-exp of the scores, the sink's included: float (double for double inputs), -inf for a
/// query without keys.
inline AttentionResult attention_with_lse(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                          const AttentionOptions& options = {}) {
  return detail::run_attention(q, k, v, options, /*with_lse=*/true);
}

}  // namespace headroom::inline v0
