#pragma once

#include <torch/types.h>

#include <concepts>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "headroom/core/intrinsics_warnings.hpp"

HEADROOM_INTRINSICS_BEGIN
#include "headroom/core/attention/mask_function.hpp"
#include "headroom/core/attention/score_function.hpp"
HEADROOM_INTRINSICS_END

namespace headroom::inline v0 {

/// A score function of one's own, for AttentionOptions: s becomes f(s, place, tables...) before the softmax, as
/// core/attention/score_function.hpp defines it. Tables are tensors [columns] or [rows, columns] on the device of q,
/// of any floating-point dtype, and get gradients.
class ScoreFunction {
 public:
  template <class F, std::same_as<torch::Tensor>... Tables>
  requires(!std::same_as<F, ScoreFunction>) ScoreFunction(F function, Tables... tables)
      : function_(std::make_shared<const F>(std::move(function))),
        calls_(&core::ScoreFunctionRef::calls<F, sizeof...(Tables)>()),
        tables_{std::move(tables)...} {}

  const std::vector<torch::Tensor>& tables() const { return tables_; }
  /// The same for tables that are held elsewhere.
  ScoreFunction without_tables() const {
    ScoreFunction bare = *this;
    bare.tables_.clear();
    return bare;
  }
  /// As kernels call it, with as many tables as it was given. It refers to this.
  core::ScoreFunctionRef ref(const std::vector<core::ScoreTable>& tables) const {
    return {function_.get(), *calls_, tables.data()};
  }

 private:
  std::shared_ptr<const void> function_;
  const core::ScoreFunctionRef::Calls* calls_;
  std::vector<torch::Tensor> tables_;
};

/// A mask function of one's own, for AttentionOptions: a core::Mask, whose keys(batch, head, query) is the range of
/// keys that a query sees, or a function of pairs, as core/attention/mask_function.hpp defines it, or both in one.
class MaskFunction {
 public:
  template <class F>
  requires(!std::same_as<F, MaskFunction>) MaskFunction(F function)
      : function_(std::make_shared<const F>(std::move(function))) {
    static_assert(!core::TwoRangeMask<F>,
                  "a mask function has one range of keys a query; AttentionOptions::global_keys widens it by another");
    if constexpr (core::Mask<F>) {
      keys_ = [](const void* f, int64_t b, int64_t h, int64_t query) -> core::KeyRange {
        return static_cast<const F*>(f)->keys(b, h, query);
      };
    }
    if constexpr (core::SeesPairs<F> || !core::Mask<F>) calls_ = &core::MaskFunctionRef::calls<F>();
  }

  core::KeyRange keys(int64_t b, int64_t h, int64_t query) const {
    return keys_ != nullptr ? keys_(function_.get(), b, h, query) : core::NoMask{}.keys(b, h, query);
  }
  /// As kernels call the function of pairs, if there is one. It refers to this.
  core::MaskFunctionRef ref() const {
    return calls_ != nullptr ? core::MaskFunctionRef(function_.get(), *calls_) : core::MaskFunctionRef();
  }

 private:
  std::shared_ptr<const void> function_;
  core::KeyRange (*keys_)(const void* f, int64_t b, int64_t h, int64_t query) = nullptr;
  const core::MaskFunctionRef::Calls* calls_ = nullptr;
};

}  // namespace headroom::inline v0
