#pragma once

#include <utility>

namespace headroom::inline v0 {

/// Names what this thread does while it lives, for traces and plans: Phase phase("optimizer"). The innermost one
/// counts; without any, code is "forward", or "backward" where autograd runs it.
class Phase {
 public:
  /// `name` must outlive every trace that saw it: a literal.
  explicit Phase(const char* name) : outer_(std::exchange(current_, name)) {}
  ~Phase() { current_ = outer_; }
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;

  /// nullptr outside of all phases.
  static const char* current() { return current_; }

 private:
  static inline thread_local const char* current_ = nullptr;

  const char* outer_;
};

}  // namespace headroom::inline v0
