#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/checkpoint/operator_interception.hpp"
#include "headroom/checkpoint/saved_tensors.hpp"
#include "headroom/core/error.hpp"
#include "headroom/runtime/operator.hpp"
#include "headroom/runtime/torch_version.hpp"

namespace headroom::inline v0 {

/// Names of operators whose results a selective checkpoint keeps: "headroom::attention", "aten::mm".
using KeptOperators = std::vector<std::string>;

namespace detail {

/// The cache of a selective checkpoint: results of operators of one checkpointed call, in the order of their calls.
class ResultCache {
 public:
  explicit ResultCache(KeptOperators names) : names_(std::move(names)) {}

  bool keeps(std::string_view name) const { return std::find(names_.begin(), names_.end(), name) != names_.end(); }
  /// Whether any of them is not headroom's own.
  bool keeps_foreign() const {
    return std::any_of(names_.begin(), names_.end(), [](const auto& name) { return !name.starts_with("headroom::"); });
  }

  /// In forward: stores results.
  void store(std::string_view name, at::TensorList results) {
    Entry& entry = entries_.emplace_back(Entry{std::string(name), {}});
    entry.results.emplace();
    for (const at::Tensor& x : results) entry.results->push_back(x.defined() ? SavedTensor(x) : SavedTensor());
  }

  /// In forward: `x` is about to be changed in place. What shares its memory is computed again, as the product that
  /// LibTorch's linear adds the bias to, behind a view that shares no version with it.
  void forget(const at::Tensor& x) {
    if (!x.defined() || !x.has_storage()) return;
    for (Entry& entry : entries_) {
      if (!entry.results) continue;
      for (const SavedTensor& kept : *entry.results) {
        if (!kept.holds_tensor() || !kept.unchecked().is_alias_of(x)) continue;
        entry.results.reset();
        break;
      }
    }
  }

  void rewind() { next_ = 0; }

  /// In recomputation: the results of the next call; none where they have to be computed.
  std::optional<std::vector<at::Tensor>> next(std::string_view name) {
    require(next_ < entries_.size() && entries_[next_].name == name, "headroom.checkpoint.mismatch",
            "recomputation calls ", name, ", forward ",
            next_ < entries_.size() ? "called " + entries_[next_].name : std::string("was through"),
            "; forward must not depend on anything that changes in between");
    const Entry& entry = entries_[next_++];
    if (!entry.results) return std::nullopt;
    std::vector<at::Tensor> results;
    for (const SavedTensor& x : *entry.results) {
      // a tensor of its own: autograd writes the new graph into it
      results.push_back(x.holds_tensor() ? x.tensor().detach() : at::Tensor());
    }
    return results;
  }

 private:
  struct Entry {
    std::string name;
    std::optional<std::vector<SavedTensor>> results;  // none: not kept after all
  };
  KeptOperators names_;
  std::vector<Entry> entries_;
  std::size_t next_ = 0;
};

/// While it lives, operators on this thread that `cache` names store their results in it, or take them from it.
/// nullptr: none do, whatever an enclosing scope says.
class ResultCacheScope final : private OperatorResults {
 public:
  enum class Mode { store, take };

  ResultCacheScope(ResultCache* cache, Mode mode) : cache_(cache), mode_(mode), outer_(std::exchange(current_, this)) {
    if (cache_ == nullptr) return;
    if (mode_ == Mode::take) cache_->rewind();
    if (!cache_->keeps_foreign()) return;
    interception_.emplace(*this);
  }
  ~ResultCacheScope() override { current_ = outer_; }

 private:
  Results call(std::string_view name, const std::function<Results()>& compute) override {
    if (cache_ == nullptr || !cache_->keeps(name)) return compute();
    if (mode_ == Mode::take) {
      if (auto results = cache_->next(name)) return *std::move(results);
    }
    const ResultCacheScope within(nullptr, mode_);  // what it calls belongs to it
    Results results = compute();
    if (mode_ == Mode::store) cache_->store(name, results);
    return results;
  }

  /// LibTorch's operators, where any of them is kept.
  class Interception final : public OperatorInterception {
   public:
    explicit Interception(ResultCacheScope& scope) : scope_(scope) {}

   private:
    void call(const Call& call) override {
      ResultCacheScope::current_ == &scope_ ? scope_.intercept(call) : call.proceed();
    }

    ResultCacheScope& scope_;
  };

  /// An operator whose results can be handed out again: it returns new tensors, and draws no random numbers, which its
  /// second call would have to skip.
  static bool is_repeatable(const c10::OperatorHandle& op) {
    const auto is_fresh = [](const c10::Argument& x) {
      return x.alias_info() == nullptr && x.type()->kind() == c10::TypeKind::TensorType;
    };
    const auto& schema = op.schema();
    return !schema.returns().empty() && std::all_of(schema.returns().begin(), schema.returns().end(), is_fresh) &&
           !schema.is_mutable() && !op.hasTag(at::Tag::nondeterministic_seeded);
  }

  static void forget_changed(ResultCache& cache, const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
    const auto& arguments = op.schema().arguments();
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].alias_info() == nullptr || !arguments[i].alias_info()->isWrite()) continue;
      const c10::IValue& value = stack[stack.size() - arguments.size() + i];
      if (value.isTensor()) cache.forget(value.toTensor());
      if (value.isTensorList()) {
        for (const at::Tensor& x : value.toTensorVector()) cache.forget(x);
      }
    }
  }

  void intercept(const OperatorInterception::Call& call) {
    const c10::OperatorHandle& op = call.op;
    torch::jit::Stack& stack = call.stack;
    const std::string& name = op.operator_name().name;
    if (mode_ == Mode::store && op.schema().is_mutable()) forget_changed(*cache_, op, stack);
    if (!is_repeatable(op) || !cache_->keeps(name)) return call.proceed();
    if (mode_ == Mode::take) {
      if (const auto results = cache_->next(name)) {
        torch::jit::drop(stack, op.schema().arguments().size());
        stack.insert(stack.end(), results->begin(), results->end());
        return;
      }
    }
    const ResultCacheScope within(nullptr, mode_);  // what it calls belongs to it
    call.proceed();
    if (mode_ == Mode::take) return;
    std::vector<at::Tensor> results;
    for (auto i = static_cast<std::ptrdiff_t>(op.schema().returns().size()); i > 0; --i)
      results.push_back(stack.end()[-i].toTensor());
    cache_->store(name, results);
  }

  static inline thread_local ResultCacheScope* current_ = nullptr;

  ResultCache* cache_;
  Mode mode_;
  ResultCacheScope* outer_;
  std::optional<Interception> interception_;
};

}  // namespace detail
}  // namespace headroom::inline v0
