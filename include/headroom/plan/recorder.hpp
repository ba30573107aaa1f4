#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/memory/counting_allocator.hpp"
#include "headroom/memory/ledger.hpp"
#include "headroom/memory/meta_allocator.hpp"
#include "headroom/plan/attribution.hpp"
#include "headroom/plan/flops.hpp"
#include "headroom/plan/operator_memory.hpp"
#include "headroom/plan/recorded_inputs.hpp"
#include "headroom/plan/trace.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/runtime/repetition.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// Records what this thread's code allocates, from its construction to finish(): tensors of the CPU and, in a dry run,
/// those that have no data, also where autograd runs its backward pass on other threads. What other threads allocate on
/// their own account is not seen, nor what a kernel's OpenMP threads do. Blocks may be freed on any thread. Recorders
/// nest: each sees all allocations, the innermost one sees the operators.
class TraceRecorder : private detail::AllocationListener {
 public:
  TraceRecorder() : name_(trace_.names), outer_(current_) {
    meta_window_.listener = this;
    host_window_.listener = &host_;
    current_ = this;
    try {
      detail::MetaAllocator::instance().open(meta_window_);
      detail::CountingAllocator::instance().open(host_window_);
      // An inner one is found by the callback of the outermost
      callback_ = outer_ != nullptr ? outer_->callback_ : add_callback();
      Registry::instance().set(callback_, this);
    } catch (...) {
      stop();
      throw;
    }
  }
  ~TraceRecorder() override { stop(); }
  TraceRecorder(const TraceRecorder&) = delete;
  TraceRecorder& operator=(const TraceRecorder&) = delete;

  /// Events until now: the time of what comes next.
  int64_t now() const {
    const std::scoped_lock lock(mutex_);
    return trace_.events;
  }

  /// The recorder of this thread, or nullptr.
  static TraceRecorder* current() { return current_; }

  /// Whether an operator of a dry run drew random numbers all the same: on the CPU, within HostTensors.
  bool drew() const { return drew_; }

  /// From now on operators that use the parameters and buffers of `module` are known to be its own. `prefix` goes in
  /// front of their paths.
  void name_modules(const torch::nn::Module& module, const std::string& prefix = {}) {
    const auto path_of = [&](const std::string& name) {
      const size_t dot = name.rfind('.');
      const std::string path = dot == std::string::npos ? std::string() : name.substr(0, dot);
      return prefix.empty() ? path : path.empty() ? prefix : prefix + "." + path;
    };
    const std::scoped_lock lock(mutex_);
    for (const auto& parameter : module.named_parameters()) {
      claim(parameter.value(), path_of(parameter.key()));
      parameters_.push_back(parameter.value());
    }
    for (const auto& buffer : module.named_buffers()) claim(buffer.value(), path_of(buffer.key()));
  }

  /// Ends the recording. Throws what kept it from being complete, such as std::bad_alloc.
  MemoryTrace finish() {
    stop();
    if (failure_ != nullptr) std::rethrow_exception(failure_);
    mark_gradients();
    detail::order_releases(trace_);
    detail::attribute_operators(trace_, name_, users_);
    detail::attribute_blocks(trace_, name_);
    return std::move(trace_);
  }

 private:
  using Operator = MemoryTrace::Operator;
  using Block = MemoryTrace::Block;

  /// What happens to CPU tensors.
  struct Host final : detail::AllocationListener {
    TraceRecorder& recorder;
    explicit Host(TraceRecorder& r) : recorder(r) {}
    void allocated(const void* block, int64_t bytes) override { recorder.add(block, bytes, true); }
    void freed(const void* block) noexcept override { recorder.freed(block); }
  };

  struct Call : at::ObserverContext {
    TraceRecorder& recorder;
    explicit Call(TraceRecorder& r) : recorder(r) {}
    int32_t op;
    at::Tensor resized;      // by the operator
    c10::DataPtr temporary;  // what the operator needs while it runs and the meta device does not ask for
  };

  static at::CallbackHandle add_callback() {
    return at::addThreadLocalCallback(at::RecordFunctionCallback(&started, &ended)
                                          .needsInputs(true)
                                          .needsOutputs(true)
                                          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
  }

  /// Who records under a callback: LibTorch hands callbacks on to the threads that run a backward pass.
  struct Registry {
    std::mutex mutex;
    std::map<at::CallbackHandle, TraceRecorder*> innermost;

    static Registry& instance() {
      static auto* registry = new Registry;
      return *registry;
    }
    void set(at::CallbackHandle callback, TraceRecorder* recorder) {
      const std::scoped_lock lock(mutex);
      if (recorder == nullptr) {
        innermost.erase(callback);
      } else {
        innermost[callback] = recorder;
      }
    }
    TraceRecorder* find(at::CallbackHandle callback) {
      const std::scoped_lock lock(mutex);
      const auto found = innermost.find(callback);
      return found != innermost.end() ? found->second : nullptr;
    }
  };

  /// The recorder that this thread works for: its own or that of the thread whose backward pass it runs; or nullptr.
  static TraceRecorder* of_this_thread() {
    if (current_ != nullptr) return current_;
    for (const auto& entry : at::get_record_function_tls_().sorted_tls_callbacks_) {
      if (TraceRecorder* const recorder = Registry::instance().find(entry.handle_)) return recorder;
    }
    return nullptr;
  }
  bool is_of_this_thread() const {
    const TraceRecorder* recorder = of_this_thread();
    while (recorder != nullptr && recorder != this) recorder = recorder->outer_;
    return recorder != nullptr;
  }

  /// Keeps the books by `f`. LibTorch goes on where a callback threw, and a deleter must not: what is thrown ends the
  /// books, and finish() throws it.
  template <class F>
  void record(F&& f) noexcept {
    if (failed_) return;
    try {
      f();
    } catch (...) {
      const std::scoped_lock lock(mutex_);
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }

  static std::unique_ptr<at::ObserverContext> started(const at::RecordFunction& function) {
    std::unique_ptr<at::ObserverContext> call;
    TraceRecorder* const recorder = of_this_thread();
    if (recorder != nullptr) recorder->record([&] { call = recorder->start(function); });
    return call;
  }
  static void ended(const at::RecordFunction& function, at::ObserverContext* context) {
    if (context == nullptr) return;
    auto& call = static_cast<Call&>(*context);
    call.recorder.record([&] { call.recorder.end(function, call); });
  }

  std::unique_ptr<at::ObserverContext> start(const at::RecordFunction& function) {
    auto call = std::make_unique<Call>(*this);
    const char* const name = function.name();
    const auto inputs = detail::recorded_inputs(function);
    detail::TemporaryBytes temporary = nullptr;
    {
      const std::scoped_lock lock(mutex_);
      Operator op{.name = name_(name),
                  .phase = phase(),
                  .is_node = function.scope() == at::RecordScope::BACKWARD_FUNCTION,
                  .parent = stack_.empty() ? -1 : stack_.back(),
                  .begin = trace_.events++};
      const Kind& kind = kind_of(function, op.name);
      if (DryRun::device().has_value() && kind.is_random) {
        DryRun::note_draw();
        const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
        drew_ = drew_ || !keys.has_backend(c10::BackendComponent::MetaBit);
      }
      detail::ParameterUser user{static_cast<int32_t>(trace_.operators.size()), {}};
      for (const c10::IValue& input : inputs) find_uses(input, user.modules);
      const bool counted = op.parent >= 0 && own_flops_[static_cast<size_t>(op.parent)];
      const bool counts = !counted && kind.flops != nullptr;
      if (counts) op.flops = kind.flops(inputs) * Repetition::current();
      call->op = user.op;
      stack_.push_back(call->op);
      trace_.operators.push_back(op);
      if (!user.modules.empty()) users_.push_back(std::move(user));
      own_flops_.push_back(counted || counts);
      if (kind.resizes && !inputs.empty() && inputs[0].isTensor()) call->resized = inputs[0].toTensor();
      temporary = kind.temporary;
    }
    const auto planned = DryRun::device();
    if (temporary != nullptr && planned.has_value() && planned->is_cpu()) {
      if (const int64_t bytes = temporary(name, inputs); bytes > 0) {
        call->temporary = detail::MetaAllocator::instance().allocate(static_cast<size_t>(bytes));
      }
    }
    return call;
  }

  void end(const at::RecordFunction& function, Call& call) {
    call.temporary.clear();
    if (call.resized.defined() && call.resized.is_meta()) {
      detail::MetaAllocator::instance().follow_resize(*call.resized.storage().unsafeGetStorageImpl());
    }
    const std::scoped_lock lock(mutex_);
    trace_.operators[static_cast<size_t>(call.op)].end = trace_.events++;
    if (!stack_.empty() && stack_.back() == call.op) stack_.pop_back();
    const int64_t begin = trace_.operators[static_cast<size_t>(call.op)].begin;
    for (const c10::IValue& output : function.outputs()) note_shape(output, begin);
    if (call.resized.defined()) note_shape(call.resized, begin);
  }

  /// What is known of an operator by its name.
  struct Kind {
    bool is_random = false;                      // it draws random numbers
    bool resizes = false;                        // it changes the size of its first argument
    detail::FlopsFormula flops = nullptr;        // nullptr: those of the operators that it calls
    detail::TemporaryBytes temporary = nullptr;  // nullptr: it needs none
  };
  const Kind& kind_of(const at::RecordFunction& function, int32_t name) {
    const auto [known, is_new] = kinds_.try_emplace(name);
    if (!is_new) return known->second;
    Kind& kind = known->second;
    const std::string_view text = function.name();
    kind.resizes = text == "aten::resize_";
    kind.flops = detail::flops_formula(text);
    kind.temporary = detail::cpu_temporaries(text);
    if (const auto op = function.operator_name()) {
      const auto handle = c10::Dispatcher::singleton().findOp(*op);
      kind.is_random = handle.has_value() && handle->hasTag(at::Tag::nondeterministic_seeded);
    }
    return kind;
  }

  static const void* block_of(const at::Tensor& x) {
    return x.defined() && x.has_storage() ? x.storage().data_ptr().get_context() : nullptr;
  }
  template <class F>
  static void for_each_tensor(const c10::IValue& value, F&& f) {
    if (value.isTensor()) {
      f(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& x : value.toTensorVector()) f(x);
    } else if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) for_each_tensor(element, f);
    }
  }
  void find_uses(const c10::IValue& value, std::vector<int32_t>& modules) const {
    if (owners_.empty()) return;
    for_each_tensor(value, [&](const at::Tensor& x) {
      const auto owner = owners_.find(block_of(x));
      if (owner != owners_.end() && std::find(modules.begin(), modules.end(), owner->second) == modules.end()) {
        modules.push_back(owner->second);
      }
    });
  }
  /// The outermost operator that made a block and returns it knows best what it looks like.
  void note_shape(const c10::IValue& value, int64_t begin) {
    for_each_tensor(value, [&](const at::Tensor& x) {
      const auto live = live_.find(block_of(x));
      if (live == live_.end() || !x.has_storage()) return;
      Block& block = trace_.blocks[live->second];
      if (block.begin < begin || static_cast<int64_t>(x.nbytes()) != block.bytes) return;
      block.shape = x.sizes().vec();
      block.dtype = x.scalar_type();
    });
  }

  void claim(const at::Tensor& x, const std::string& path) {
    if (const void* const block = block_of(x); block != nullptr) {
      owners_[block] = name_(path);
      if (const auto live = live_.find(block); live != live_.end()) {
        trace_.blocks[live->second].use = MemoryUse::parameter;
        trace_.blocks[live->second].module = owners_[block];
      }
    }
  }

  int32_t phase() {
    const char* const named = Phase::current();
    const bool backward = torch::autograd::get_current_graph_task_id() != -1;
    if (was_backward_ && !backward) mark_gradients();
    was_backward_ = backward;
    return last_phase_ = name_(named != nullptr ? named : backward ? "backward" : "forward");
  }

  void allocated(const void* block, int64_t bytes) override { add(block, bytes, false); }
  void freed(const void* block) noexcept override {
    record([&] {
      const std::scoped_lock lock(mutex_);
      owners_.erase(block);
      const auto live = live_.find(block);
      if (live == live_.end()) return;
      trace_.blocks[live->second].end = trace_.events++;
      trace_.blocks[live->second].end_phase = is_of_this_thread() ? phase() : last_phase_;
      live_.erase(live);
    });
  }
  void add(const void* block, int64_t bytes, bool on_host) {
    record([&] {
      if (!is_of_this_thread()) return;
      const std::scoped_lock lock(mutex_);
      live_[block] = trace_.blocks.size();
      trace_.blocks.push_back({.bytes = bytes,
                               .begin = trace_.events++,
                               .op = stack_.empty() ? -1 : stack_.back(),
                               .phase = phase(),
                               .on_host = on_host});
    });
  }

  void mark_gradients() {
    for (const at::Tensor& parameter : parameters_) {
      const auto live = live_.find(block_of(parameter.grad()));
      if (live == live_.end()) continue;
      trace_.blocks[live->second].use = MemoryUse::gradient;
      if (const auto owner = owners_.find(block_of(parameter)); owner != owners_.end()) {
        trace_.blocks[live->second].module = owner->second;
      }
    }
  }

  void stop() {
    if (!recording_) return;
    recording_ = false;
    Registry::instance().set(callback_, outer_);
    if (outer_ == nullptr && callback_ != at::INVALID_CALLBACK_HANDLE) at::removeCallback(callback_);
    detail::CountingAllocator::instance().close(host_window_);
    detail::MetaAllocator::instance().close(meta_window_);
    current_ = outer_;
  }

  static inline thread_local TraceRecorder* current_ = nullptr;

  MemoryTrace trace_;
  detail::NameTable name_;
  TraceRecorder* outer_;
  Host host_{*this};
  detail::MeterWindow meta_window_, host_window_;
  at::CallbackHandle callback_ = at::INVALID_CALLBACK_HANDLE;
  bool recording_ = true;
  bool was_backward_ = false;
  int32_t last_phase_ = name_("forward");  ///< of what this recorder saw last

  std::atomic<bool> failed_ = false;
  std::exception_ptr failure_;

  mutable std::recursive_mutex mutex_;
  std::vector<int32_t> stack_;               // operators that are running
  std::deque<detail::ParameterUser> users_;  // in the order of their calls
  std::vector<bool> own_flops_;              // of each operator: its FLOPs and those of its callees are known
  bool drew_ = false;
  std::unordered_map<int32_t, Kind> kinds_;  // of operators, by name
  std::unordered_map<const void*, size_t> live_;
  std::unordered_map<const void*, int32_t> owners_;
  std::vector<at::Tensor> parameters_;
};

/// Names the modules of `module` in the trace or plan that this thread is in, if any; see TraceRecorder::name_modules.
inline void name_modules(const torch::nn::Module& module, const std::string& prefix = {}) {
  if (TraceRecorder::current() != nullptr) TraceRecorder::current()->name_modules(module, prefix);
}

}  // namespace headroom::inline v0
