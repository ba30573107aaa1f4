#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <utility>
#include <vector>

#include "headroom/attention/backend.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/operator.hpp"

namespace headroom::inline v0::detail {

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
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
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

/// Tensors of a request that may have a gradient, as edges of the graph; autograd takes none that are undefined.
inline torch::autograd::variable_list with_differentiable(torch::autograd::variable_list tensors,
                                                          const AttentionRequest& request) {
  for (const torch::Tensor* x : {&request.bias, &request.relative_bias, &request.alibi_slopes, &request.sink,
                                 &request.score_tables, &request.polar_phase}) {
    if (x->defined()) tensors.push_back(*x);
  }
  return tensors;
}
/// Appends the gradients of those to `grads`; `given` are those of a request that are differentiable.
inline void append_differentiable(torch::autograd::variable_list& grads, at::TensorList given,
                                  const torch::autograd::variable_list& gradients) {
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i].defined()) grads.push_back(gradients[i]);
  }
}

/// Attention of a backend as a node of the graph.
template <class Backend>
struct AttentionFunction : torch::autograd::Function<AttentionFunction<Backend>> {
  /// `differentiable`: q, k, v, and what of the request may have a gradient.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList differentiable,
                                                AttentionRequest request) {
    const torch::Tensor &q = differentiable[0], &k = differentiable[1], &v = differentiable[2];
    const AttentionForward result = attention_result([&] { return Backend::forward({q, k, v, request}); });
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
    constexpr size_t kResults = 3 + AttentionRequest::kTensors;
    const AttentionRequest request = saved_request(ctx, all.slice(3, AttentionRequest::kTensors));
    const AttentionInputs in{saved[0], saved[1], saved[2], request};
    const AttentionForward forward{saved[kResults], saved[kResults + 1], all.slice(kResults + 2).vec()};
    WantedGradients wanted{};
    for (size_t i = 0, edge = 0; i < wanted.size(); ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    }
    torch::autograd::variable_list inputs = all.slice(0, wanted.size()).vec();
    inputs.insert(inputs.end(), grad.begin(), grad.end());
    const auto gradients = first_derivatives(inputs, [&]() -> torch::autograd::variable_list {
      const ResultGradients by_result{grad[0].defined() ? grad[0].resolve_neg() : torch::zeros_like(forward.output),
                                      grad[1].defined() ? grad[1].resolve_neg() : grad[1]};
      AttentionGradients g = Backend::backward(in, forward, by_result, wanted);
      return {g.q, g.k, g.v, g.bias, g.relative_bias, g.alibi_slopes, g.sink, g.score_tables, g.polar_phase};
    });
    torch::autograd::variable_list grads(gradients.begin(), gradients.begin() + 3);
    append_differentiable(grads, all.slice(3, AttentionRequest::kDifferentiable),
                          {gradients.begin() + 3, gradients.end()});
    grads.emplace_back();  // the request has no gradient
    return grads;
  }

  static AttentionForward run(const AttentionInputs& in) {
    const auto& [q, k, v, request] = in;
    const auto differentiable = with_differentiable({q, k, v}, request);
    const auto results = AttentionFunction::apply(at::TensorList(differentiable), AttentionRequest(request));
    return {results[0], results[1]};
  }
};

}  // namespace headroom::inline v0::detail
