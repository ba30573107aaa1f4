#pragma once

#include <ATen/Parallel.h>

namespace headroom::testing {

/// For tests of thousands of tiny operators, where threads would only wait for each other.
class OneThread {
 public:
  OneThread() { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = at::get_num_threads();
};

}  // namespace headroom::testing
