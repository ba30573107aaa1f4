#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/plan/flops.hpp"
#include "headroom/plan/operator_memory.hpp"
#include "headroom/plan/recorded_inputs.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/runtime/phase.hpp"
#include "headroom/runtime/repetition.hpp"

namespace headroom::inline v0 {

/// What a block of memory is for.
enum class MemoryUse { parameter, gradient, optimizer, activation, temporary, workspace };
inline constexpr std::string_view kMemoryUseNames[] = {"parameters",  "gradients",   "optimizer state",
                                                       "activations", "temporaries", "workspace"};
inline constexpr int kMemoryUses = 6;

/// The memory of a piece of code, event by event. Times count the events.
struct MemoryTrace {
  static constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

  /// A call of an operator. A step has up to millions of them: fields are packed.
  struct Operator {
    int32_t name;          ///< in `names`
    int32_t module = -1;   ///< in `names`: path of the module it belongs to
    int32_t phase : 31;    ///< in `names`
    bool is_node : 1 = 0;  ///< a node of the graph that backward runs, not an operator
    int32_t parent = -1;   ///< in `operators`: who called it
    int64_t begin, end = kForever;
    double flops = 0;  ///< without those of the operators it calls
  };
  struct Block {
    int64_t bytes;
    int64_t begin, end = kForever;  ///< kForever: was still there when the trace ended
    int32_t op = -1;                ///< in `operators`: who asked for it
    int32_t module = -1;            ///< in `names`: path of the module whose it is
    int32_t phase;                  ///< in `names`
    int32_t end_phase = -1;         ///< in `names`: when it was freed; -1: never
    MemoryUse use = MemoryUse::temporary;
    bool on_host = false;  ///< of a CPU tensor, while the trace is that of another device
    c10::ScalarType dtype = c10::ScalarType::Byte;
    std::vector<int64_t> shape = {};  ///< of the first tensor in it; {bytes} if nobody saw one
  };

  std::vector<std::string> names;
  std::deque<Operator> operators;  ///< in the order of their calls; a deque needs no copy to grow
  std::deque<Block> blocks;        ///< in the order of their allocation
  int64_t events = 0;
  std::vector<std::string> estimated = {};  ///< operators of a dry run whose memory is not known exactly

  /// The longest path of modules that both paths start with: "layers.0.norm", "layers.0.linear" -> "layers.0".
  static std::string_view common_path(std::string_view a, std::string_view b) {
    size_t length = 0;
    for (size_t i = 0;; ++i) {
      const bool a_ends = i == a.size() || a[i] == '.', b_ends = i == b.size() || b[i] == '.';
      if (a_ends && b_ends) length = i;
      if (i >= a.size() || i >= b.size() || a[i] != b[i]) break;
    }
    return a.substr(0, length);
  }
};

namespace detail {

/// Names that are stored once.
class NameTable {
 public:
  explicit NameTable(std::vector<std::string>& names) : names_(names) {}
  int32_t operator()(std::string_view name) {
    const auto known = index_.find(name);
    if (known != index_.end()) return known->second;
    names_.emplace_back(name);
    return index_.emplace(names_.back(), static_cast<int32_t>(names_.size() - 1)).first->second;
  }

 private:
  std::vector<std::string>& names_;
  std::map<std::string, int32_t, std::less<>> index_;
};

}  // namespace detail

/// Records what this thread's code allocates, from its construction to finish(): tensors of the CPU and, in a dry run,
/// those that have no data, also where autograd runs its backward pass on other threads. What other threads allocate on
/// their own account is not seen, nor what a kernel's OpenMP threads do. Blocks may be freed on any thread. Recorders
/// nest: each sees all allocations, the innermost one sees the operators.
class TraceRecorder : private detail::AllocationListener {
 public:
  TraceRecorder() : name_(trace_.names), outer_(std::exchange(current_, this)) {
    meta_window_.listener = this;
    host_window_.listener = &host_;
    detail::MetaAllocator::instance().open(meta_window_);
    try {
      detail::CountingAllocator::instance().open(host_window_);
    } catch (...) {
      detail::MetaAllocator::instance().close(meta_window_);
      current_ = outer_;
      throw;
    }
    // An inner one is found by the callback of the outermost
    callback_ = outer_ != nullptr ? outer_->callback_ : add_callback();
    Registry::instance().set(callback_, this);
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

  /// Ends the recording.
  MemoryTrace finish() {
    stop();
    mark_gradients();
    attribute();
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
    void freed(const void* block) override { recorder.freed(block); }
  };

  struct Call : at::ObserverContext {
    TraceRecorder& recorder;
    explicit Call(TraceRecorder& r) : recorder(r) {}
    int32_t op;
    bool resizes;
    at::Tensor resized;
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
      innermost[callback] = recorder;
      if (recorder == nullptr) innermost.erase(callback);
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

  static std::unique_ptr<at::ObserverContext> started(const at::RecordFunction& function) {
    TraceRecorder* const recorder = of_this_thread();
    return recorder != nullptr ? recorder->start(function) : nullptr;
  }
  static void ended(const at::RecordFunction& function, at::ObserverContext* context) {
    if (context == nullptr) return;
    auto& call = static_cast<Call&>(*context);
    call.recorder.end(function, call);
  }

  std::unique_ptr<at::ObserverContext> start(const at::RecordFunction& function) {
    auto call = std::make_unique<Call>(*this);
    const char* const name = function.name();
    const auto inputs = detail::recorded_inputs(function);
    {
      const std::scoped_lock lock(mutex_);
      Operator op{.name = name_(name),
                  .phase = phase(),
                  .is_node = function.scope() == at::RecordScope::BACKWARD_FUNCTION,
                  .parent = stack_.empty() ? -1 : stack_.back(),
                  .begin = trace_.events++};
      if (DryRun::device().has_value() && is_random(function, op.name)) {
        DryRun::note_draw();
        const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
        drew_ = drew_ || !keys.has_backend(c10::BackendComponent::MetaBit);
      }
      User user{static_cast<int32_t>(trace_.operators.size()), {}};
      for (const c10::IValue& input : inputs) find_uses(input, user.modules);
      const bool counted = op.parent >= 0 && own_flops_[static_cast<size_t>(op.parent)];
      const auto flops = counted ? std::nullopt : flops_of(name, inputs);
      op.flops = flops.value_or(0) * Repetition::current();
      call->op = user.op;
      stack_.push_back(call->op);
      trace_.operators.push_back(op);
      if (!user.modules.empty()) users_.push_back(std::move(user));
      own_flops_.push_back(counted || flops.has_value());
      call->resizes = std::string_view(name) == "aten::resize_";
      if (call->resizes && !inputs.empty() && inputs[0].isTensor()) call->resized = inputs[0].toTensor();
    }
    if (const auto planned = DryRun::device(); planned.has_value() && planned->is_cpu()) {
      if (const int64_t bytes = detail::cpu_temporary_bytes(name, inputs); bytes > 0) {
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

  bool is_random(const at::RecordFunction& function, int32_t name) {
    const auto [known, is_new] = random_.try_emplace(name, false);
    if (const auto op = is_new ? function.operator_name() : std::nullopt) {
      const auto handle = c10::Dispatcher::singleton().findOp(*op);
      known->second = handle.has_value() && handle->hasTag(at::Tag::nondeterministic_seeded);
    }
    return known->second;
  }

  /// An operator that uses parameters or buffers.
  struct User {
    int32_t op;
    std::vector<int32_t> modules;  // whose they are: in names
  };

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
  void freed(const void* block) override {
    const std::scoped_lock lock(mutex_);
    owners_.erase(block);
    const auto live = live_.find(block);
    if (live == live_.end()) return;
    trace_.blocks[live->second].end = trace_.events++;
    trace_.blocks[live->second].end_phase = is_of_this_thread() ? phase() : last_phase_;
    live_.erase(live);
  }
  void add(const void* block, int64_t bytes, bool on_host) {
    if (!is_of_this_thread()) return;
    const std::scoped_lock lock(mutex_);
    live_[block] = trace_.blocks.size();
    trace_.blocks.push_back({.bytes = bytes,
                             .begin = trace_.events++,
                             .op = stack_.empty() ? -1 : stack_.back(),
                             .phase = phase(),
                             .on_host = on_host});
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
    if (outer_ == nullptr) at::removeCallback(callback_);
    detail::CountingAllocator::instance().close(host_window_);
    detail::MetaAllocator::instance().close(meta_window_);
    current_ = outer_;
  }

  /// Gives every operator its module and every block its use.
  void attribute() {
    // An operator that uses parameters belongs to what their modules have in common. Another one belongs to its caller,
    // or lies between two that do: to the deepest module that has both of these in it.
    auto& operators = trace_.operators;
    const auto path = [&](int32_t name) -> std::string_view { return trace_.names[static_cast<size_t>(name)]; };
    const auto join = [&](const std::vector<int32_t>& modules) {
      std::string_view common = path(modules.front());
      for (const int32_t module : modules) common = MemoryTrace::common_path(common, path(module));
      return name_(std::string(common));
    };
    const auto join_nearest = [&](const std::vector<int32_t>& before, const std::vector<int32_t>& after) {
      std::string_view best;
      for (const int32_t a : before) {
        for (const int32_t b : after) {
          const std::string_view common = MemoryTrace::common_path(path(a), path(b));
          if (common.size() > best.size()) best = common;
        }
      }
      return name_(std::string(best));
    };
    auto user = users_.begin();   // the next one that uses parameters
    int32_t between = name_("");  // the module of what lies between the one before and that one
    for (size_t i = 0; i < operators.size(); ++i) {
      Operator& op = operators[i];
      if (user != users_.end() && user->op == static_cast<int32_t>(i)) {
        op.module = join(user->modules);
        const auto& before = user->modules;
        between = ++user == users_.end() ? name_("") : join_nearest(before, user->modules);
        continue;
      }
      op.module = between;
      if (op.parent < 0) continue;
      // Not from a node of the graph: within it a checkpoint may run a whole forward pass
      const Operator& caller = operators[static_cast<size_t>(op.parent)];
      if (!caller.is_node && !path(caller.module).empty()) op.module = caller.module;
    }
    const int32_t workspace = name_("headroom::workspace"), optimizer = name_("optimizer"),
                  backward = name_("backward");
    for (Block& block : trace_.blocks) {
      if (block.shape.empty()) block.shape = {block.bytes};
      if (block.module < 0) block.module = block.op >= 0 ? operators[static_cast<size_t>(block.op)].module : name_("");
      if (block.use != MemoryUse::temporary) continue;
      const auto is_workspace = [&](int32_t op) {
        return op >= 0 && operators[static_cast<size_t>(op)].name == workspace;
      };
      if (is_workspace(block.op) || (block.op >= 0 && is_workspace(operators[static_cast<size_t>(block.op)].parent))) {
        block.use = MemoryUse::workspace;
      } else if (block.phase == optimizer && block.end_phase != block.phase) {
        block.use = MemoryUse::optimizer;
      } else if (block.phase != backward && block.end_phase != block.phase) {
        block.use = MemoryUse::activation;
      }
    }
  }
  static inline thread_local TraceRecorder* current_ = nullptr;

  MemoryTrace trace_;
  detail::NameTable name_;
  TraceRecorder* outer_;
  Host host_{*this};
  detail::MeterWindow meta_window_, host_window_;
  at::CallbackHandle callback_{};
  bool recording_ = true;
  bool was_backward_ = false;
  int32_t last_phase_ = name_("forward");  ///< of what this recorder saw last

  mutable std::recursive_mutex mutex_;
  std::vector<int32_t> stack_;   // operators that are running
  std::deque<User> users_;       // in the order of their calls
  std::vector<bool> own_flops_;  // of each operator: its FLOPs and those of its callees are known
  bool drew_ = false;
  std::unordered_map<int32_t, bool> random_;  // by name: whether the operator draws random numbers
  std::unordered_map<const void*, size_t> live_;
  std::unordered_map<const void*, int32_t> owners_;
  std::vector<at::Tensor> parameters_;
};

/// Names the modules of `module` in the trace or plan that this thread is in, if any; see TraceRecorder::name_modules.
inline void name_modules(const torch::nn::Module& module, const std::string& prefix = {}) {
  if (TraceRecorder::current() != nullptr) TraceRecorder::current()->name_modules(module, prefix);
}

}  // namespace headroom::inline v0
