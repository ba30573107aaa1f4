#pragma once

#include <utility>

namespace headroom::inline v0 {

/// While it lives, what this thread does in a dry run stands for `times` runs of the same code one after the other,
/// which need the memory of one and as many times its operations.
class Repetition {
 public:
  explicit Repetition(double times) : outer_(std::exchange(current_, current_ * times)) {}
  ~Repetition() { current_ = outer_; }
  Repetition(const Repetition&) = delete;
  Repetition& operator=(const Repetition&) = delete;

  static double current() { return current_; }

 private:
  static inline thread_local double current_ = 1;

  double outer_;
};

}  // namespace headroom::inline v0
