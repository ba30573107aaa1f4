#pragma once

#include <cstddef>

#include "headroom/core/view.hpp"

namespace headroom::inline v0::core::detail {

/// A pass of attention over all heads, in tasks. What computes it was compiled for one instruction set; who runs the
/// tasks need not know which.
class Pass {
 public:
  virtual ~Pass() = default;

  /// Of all workers.
  virtual Index workspace_bytes() const = 0;
  /// To be called once, before any task.
  virtual void use(std::byte* workspace) = 0;
  /// Tasks that come first, all before any of the others.
  virtual Index preparations() const = 0;
  virtual void prepare(Index task) = 0;
  /// Tasks start in ascending order; one may wait for those before.
  virtual Index tasks() const = 0;
  virtual void run(Index task, int worker) = 0;
};

}  // namespace headroom::inline v0::core::detail
