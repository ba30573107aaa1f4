#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <limits>
#include <string>

#include "headroom/attention/attention.hpp"
#include "headroom/runtime/torch_version.hpp"

// Registers headroom::attention with PyTorch's dispatcher, where Python finds it as torch.ops.headroom.attention. To be
// included in exactly one unit of a program or shared library: a second registration in one process fails.
//
//   attention(q, k, v, *, options) -> output                      composed of what follows
//   attention_with_lse(q, k, v, *, options) -> (output, lse)      the same
//   attention_forward(q, k, v, *, options) -> (output, lse)       lse in double; differentiable
//   attention_backward(grad_output, grad_lse, output, lse, q, k, v, *, options, wanted) -> eight gradients
//
// Options are those of AttentionOptions under the same names, with these differences: `window` is two numbers, `seed`
// is an int64 tensor on the CPU that is drawn from LibTorch's generator unless given, `alignment` and `backend` are
// names, and functions of one's own are left out.

namespace headroom::inline v0::detail {

inline constexpr const char* kAttentionOptionsSchema =
    "float? scale=None, str alignment=\"top_left\", SymInt query_offset=0, bool causal=False, SymInt window_left=-1, "
    "SymInt window_right=-1, SymInt global_keys=0, "
    "Tensor? key_lengths=None, Tensor? sequence_starts=None, Tensor? key_sequence_starts=None, Tensor? mask=None, "
    "Tensor? hidden=None, Tensor? block_mask=None, SymInt block_size=128, Tensor? bias=None, "
    "Tensor? relative_bias=None, Tensor? alibi_slopes=None, Tensor? sink=None, float? softcap=None, "
    "Tensor? rotary=None, Tensor? polar=None, Tensor? polar_phase=None, float dropout=0.0, Tensor? seed=None, str "
    "backend=\"automatic\"";

/// A call of an operator: its arguments by name.
class OperatorCall {
 public:
  /// Takes the arguments off the stack.
  OperatorCall(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : schema_(&op.schema()), values_(torch::jit::pop(stack, schema_->arguments().size())) {}

  c10::IValue& operator[](const char* name) { return values_[position(name)]; }
  const c10::IValue& operator[](const char* name) const { return values_[position(name)]; }
  const torch::Tensor& tensor(const char* name) const { return (*this)[name].toTensor(); }
  std::optional<torch::Tensor> optional_tensor(const char* name) const {
    return (*this)[name].toOptional<torch::Tensor>();
  }

  std::vector<c10::IValue>& values() { return values_; }
  const std::vector<c10::IValue>& values() const { return values_; }

  /// The tensors among the arguments, in their order; what is not given is not among them.
  torch::autograd::variable_list tensors() const {
    torch::autograd::variable_list tensors;
    for (const c10::IValue& value : values_) {
      if (value.isTensor()) tensors.push_back(value.toTensor());
    }
    return tensors;
  }
  void set_tensors(at::TensorList tensors) {
    auto next = tensors.begin();
    for (c10::IValue& value : values_) {
      if (value.isTensor()) value = *next++;
    }
  }

 private:
  size_t position(const char* name) const { return *schema_->argumentIndexWithName(name); }

  const c10::FunctionSchema* schema_;
  std::vector<c10::IValue> values_;
};

inline torch::jit::Stack call_operator(const char* name, torch::jit::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack;
}

inline AttentionOptions options_of(const OperatorCall& call) {
  const double dropout = call["dropout"].toDouble();
  std::optional<uint64_t> seed;
  if (dropout > 0) {
    const auto given = call.optional_tensor("seed");
    require(given.has_value() && given->numel() == 1 && given->scalar_type() == torch::kLong && given->is_cpu(),
            "headroom.attention.dropout", "dropout is ", dropout, " but seed is not one int64 on the CPU; give one, ",
            "such as torch.randint(2**63 - 1, ())");
    seed = static_cast<uint64_t>(given->item<int64_t>());
  }
  return AttentionOptions()
      .scale(call["scale"].toOptional<double>())
      .alignment(attention_alignment(call["alignment"].toStringView()))
      .query_offset(call["query_offset"].toInt())
      .causal(call["causal"].toBool())
      .window(AttentionWindow{call["window_left"].toInt(), call["window_right"].toInt()})
      .global_keys(call["global_keys"].toInt())
      .key_lengths(call.optional_tensor("key_lengths"))
      .sequence_starts(call.optional_tensor("sequence_starts"))
      .key_sequence_starts(call.optional_tensor("key_sequence_starts"))
      .mask(call.optional_tensor("mask"))
      .hidden(call.optional_tensor("hidden"))
      .block_mask(call.optional_tensor("block_mask"))
      .block_size(call["block_size"].toInt())
      .bias(call.optional_tensor("bias"))
      .relative_bias(call.optional_tensor("relative_bias"))
      .alibi_slopes(call.optional_tensor("alibi_slopes"))
      .sink(call.optional_tensor("sink"))
      .softcap(call["softcap"].toOptional<double>())
      .rotary(call.optional_tensor("rotary"))
      .polar(call.optional_tensor("polar"))
      .polar_phase(call.optional_tensor("polar_phase"))
      .dropout(dropout)
      .seed(seed)
      .backend(attention_backend(call["backend"].toStringView()));
}

// ---- what computes ----

/// A call as the backends take it. Keys and values that batches share are views of the shape that backends step
/// through.
struct BackendCall {
  torch::Tensor q, k, v;
  AttentionRequest request;
  AttentionBackend backend;

  explicit BackendCall(const OperatorCall& call) : q(call.tensor("q")), k(call.tensor("k")), v(call.tensor("v")) {
    const AttentionOptions options = options_of(call);
    request = AttentionRequest::check(q, k, v, options);
    backend = resolve_backend(q, request, options.backend());
    require(backend != AttentionBackend::reference, "headroom.attention.backend",
            "attention_forward does not serve the backend reference; call attention or attention_with_lse");
    if (backend == AttentionBackend::fused || q.dim() > 4) {
      k = with_batch_of(q, k);
      v = with_batch_of(q, v);
    }
  }

  AttentionForward forward() const {
    switch (backend) {
      case AttentionBackend::tiled:
        return TiledBackend::forward({q, k, v, request});
      case AttentionBackend::fused:
        return FusedBackend::forward({q, k, v, request});
      default:
        return ChunkedBackend::forward({q, k, v, request});
    }
  }

  AttentionGradients backward(const AttentionForward& result, const ResultGradients& grad,
                              const WantedGradients& wanted) const {
    const AttentionInputs in{q, k, v, request};
    if (backend == AttentionBackend::tiled) return TiledBackend::backward(in, result, grad, wanted);
    // The fused kernels know no gradient of a bias, and what else they want in backward is computed again
    if (backend == AttentionBackend::fused && !wanted[3]) {
      return FusedBackend::backward(in, FusedBackend::forward(in), grad, wanted);
    }
    return ChunkedBackend::backward(in, result, grad, wanted);
  }
};

/// Where backward's results come from: the arguments whose gradients they are.
inline constexpr std::array<const char*, 8> kDifferentiable = {
    "q", "k", "v", "bias", "relative_bias", "alibi_slopes", "sink", "polar_phase"};

/// Whether these are asked for.
using WantedByOperator = std::array<bool, kDifferentiable.size()>;

/// An uninitialised gradient of argument i: in memory in the order of q, k or v, contiguous for the others.
inline torch::Tensor empty_gradient(size_t i, const torch::Tensor& of) {
  return i < 3 ? empty_in_order_of(of, of.sym_sizes(), of.options()) : at::empty_symint(of.sym_sizes(), of.options());
}

inline void compute_attention_forward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const torch::NoGradGuard no_grad;
  const OperatorCall call(op, *stack);
  const AttentionForward result = BackendCall(call).forward();
  torch::jit::push(*stack, result.output, result.lse);
}

inline void compute_attention_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const torch::NoGradGuard no_grad;
  const OperatorCall call(op, *stack);
  const auto wanted = call["wanted"].to<WantedByOperator>();
  WantedGradients of_backend{};
  std::ranges::copy(wanted, of_backend.begin());
  std::swap(of_backend[7], of_backend[8]);  // tables of score functions are not among the arguments
  const auto grad_lse = call.optional_tensor("grad_lse");
  AttentionGradients grad =
      BackendCall(call).backward({call.tensor("output"), call.tensor("lse")},
                                 {call.tensor("grad_output"), grad_lse.value_or(torch::Tensor())}, of_backend);
  torch::Tensor* const computed[] = {
      &grad.q, &grad.k, &grad.v, &grad.bias, &grad.relative_bias, &grad.alibi_slopes, &grad.sink, &grad.polar_phase};
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto of = call.optional_tensor(kDifferentiable[i]);
    torch::Tensor result;
    if (wanted[i] && of.has_value()) {
      result = empty_gradient(i, *of);
      const torch::Tensor sum = computed[i]->sum_to_size(of->sizes());  // over batches that share k and v
      if (sum.strides() == result.strides()) {
        result = sum;
      } else {
        result.copy_(sum);
      }
    }
    torch::jit::push(*stack, result);
  }
}

// ---- what is known before anything is computed: shapes on the meta device ----

inline void shape_attention_forward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const OperatorCall call(op, *stack);
  const torch::Tensor &q = call.tensor("q"), &k = call.tensor("k"), &v = call.tensor("v");
  require(q.dim() >= 3 && k.dim() == q.dim() && v.dim() == q.dim(), "headroom.attention.shape", "q, k and v have ",
          q.dim(), ", ", k.dim(), " and ", v.dim(), " dimensions; expected the same number, 3 or more");
  std::vector<c10::SymInt> sizes = q.sym_sizes().vec();
  sizes.back() = v.sym_size(-1);
  const torch::Tensor output = empty_in_order_of(q, sizes, q.options());
  sizes.pop_back();
  torch::jit::push(*stack, output, at::empty_symint(sizes, q.options().dtype(torch::kDouble)));
}

inline void shape_attention_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const OperatorCall call(op, *stack);
  const auto wanted = call["wanted"].to<WantedByOperator>();
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto of = call.optional_tensor(kDifferentiable[i]);
    torch::jit::push(*stack, wanted[i] && of.has_value() ? empty_gradient(i, *of) : torch::Tensor());
  }
}

// ---- autograd ----

struct SavedCall : torch::CustomClassHolder {
  explicit SavedCall(OperatorCall c) : call(std::move(c)) {
    call.set_tensors(std::vector<torch::Tensor>(call.values().size()));
  }
  OperatorCall call;
};

/// Operators attention_forward and attention_backward tied together; both are seen by whatever traces PyTorch.
struct AttentionOperator : torch::autograd::Function<AttentionOperator> {
  using Optional = std::optional<torch::Tensor>;

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const torch::Tensor&,
                                                const torch::Tensor&, const torch::Tensor&, const Optional&,
                                                const Optional&, const Optional&, const Optional&, const Optional&,
                                                const OperatorCall& call) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto results = call_operator("headroom::attention_forward", call.values());
    torch::autograd::variable_list saved{results[0].toTensor(), results[1].toTensor()};
    for (torch::Tensor& x : call.tensors()) saved.push_back(std::move(x));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(c10::make_intrusive<SavedCall>(call));
    ctx->set_materialize_grads(false);
    return {results[0].toTensor(), results[1].toTensor()};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    const auto saved = ctx->get_saved_variables();
    const auto holder = ctx->saved_data["call"].toCapsule();
    OperatorCall call = static_cast<const SavedCall&>(*holder).call;
    call.set_tensors(at::TensorList(saved).slice(2));
    WantedByOperator wanted{};
    for (size_t i = 0, edge = 0; i < wanted.size(); ++i) {
      wanted[i] = call.optional_tensor(kDifferentiable[i]).has_value() && ctx->needs_input_grad(edge++);
    }
    torch::jit::Stack stack{grad[0].defined() ? grad[0] : torch::zeros_like(saved[0]),
                            grad[1].defined() ? c10::IValue(grad[1]) : c10::IValue(), saved[0], saved[1]};
    stack.insert(stack.end(), call.values().begin(), call.values().end());
    stack.emplace_back(wanted);
    torch::autograd::variable_list grads;
    for (c10::IValue& value : call_operator("headroom::attention_backward", std::move(stack))) {
      grads.push_back(std::move(value).toTensor());
    }
    grads.emplace_back();  // the call has no gradient
    return grads;
  }
};

inline void differentiable_attention_forward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const OperatorCall call(op, *stack);
  const auto results =
      AttentionOperator::apply(call.tensor("q"), call.tensor("k"), call.tensor("v"), call.optional_tensor("bias"),
                               call.optional_tensor("relative_bias"), call.optional_tensor("alibi_slopes"),
                               call.optional_tensor("sink"), call.optional_tensor("polar_phase"), call);
  torch::jit::push(*stack, results[0], results[1]);
}

inline void differentiable_attention_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const OperatorCall call(op, *stack);
  const auto grads = first_derivatives(call.tensors(), [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    torch::autograd::variable_list results;
    for (c10::IValue& value : call_operator("headroom::attention_backward", call.values())) {
      results.push_back(std::move(value).toTensor());
    }
    return results;
  });
  for (const torch::Tensor& grad : grads) torch::jit::push(*stack, grad);
}

// ---- what users call ----

/// Output and, where wanted, log-sum-exp; `call` may be traced.
inline AttentionResult composed_attention(OperatorCall call, bool with_lse) {
  if (call["dropout"].toDouble() > 0 && call["seed"].isNone()) {
    // By an operator, so that a compiled graph draws anew each time
    call["seed"] = at::randint(std::numeric_limits<int64_t>::max(), {}, torch::kLong);
  }
  if (attention_backend(call["backend"].toStringView()) == AttentionBackend::reference) {
    return run_attention(call.tensor("q"), call.tensor("k"), call.tensor("v"), options_of(call), with_lse);
  }
  const bool is_double = call.tensor("q").scalar_type() == torch::kDouble;
  const auto results = call_operator("headroom::attention_forward", std::move(call.values()));
  return {results[0].toTensor(),
          with_lse ? results[1].toTensor().to(is_double ? torch::kDouble : torch::kFloat) : torch::Tensor()};
}

inline void compose_attention(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::push(*stack, composed_attention(OperatorCall(op, *stack), /*with_lse=*/false).output);
}
inline void compose_attention_with_lse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto [output, lse] = composed_attention(OperatorCall(op, *stack), /*with_lse=*/true);
  torch::jit::push(*stack, output, lse);
}

template <c10::BoxedKernel::BoxedKernelFunction* kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

TORCH_LIBRARY(headroom, library) {
  const std::string inputs = std::string("(Tensor q, Tensor k, Tensor v, *, ") + kAttentionOptionsSchema + ") -> ";
  const auto define = [&](const std::string& schema) { library.def(schema.c_str(), {at::Tag::pt2_compliant_tag}); };
  define("attention" + inputs + "Tensor");
  define("attention_with_lse" + inputs + "(Tensor output, Tensor lse)");
  define("attention_forward" + inputs + "(Tensor output, Tensor lse)");
  define(std::string("attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, Tensor q, "
                     "Tensor k, Tensor v, *, ") +
         kAttentionOptionsSchema +
         ", bool[8] wanted) -> (Tensor q, Tensor k, Tensor v, Tensor bias, Tensor relative_bias, "
         "Tensor alibi_slopes, Tensor sink, Tensor polar_phase)");
}
TORCH_LIBRARY_IMPL(headroom, CompositeImplicitAutograd, library) {
  library.impl("attention", boxed<&compose_attention>());
  library.impl("attention_with_lse", boxed<&compose_attention_with_lse>());
}
TORCH_LIBRARY_IMPL(headroom, CompositeExplicitAutograd, library) {
  library.impl("attention_forward", boxed<&compute_attention_forward>());
  library.impl("attention_backward", boxed<&compute_attention_backward>());
}
TORCH_LIBRARY_IMPL(headroom, Meta, library) {
  library.impl("attention_forward", boxed<&shape_attention_forward>());
  library.impl("attention_backward", boxed<&shape_attention_backward>());
}
TORCH_LIBRARY_IMPL(headroom, Autograd, library) {
  library.impl("attention_forward", boxed<&differentiable_attention_forward>());
  library.impl("attention_backward", boxed<&differentiable_attention_backward>());
}

}  // namespace headroom::inline v0::detail
