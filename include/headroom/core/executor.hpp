#pragma once

#include <concepts>
#include <cstddef>
#include <exception>
#include <memory>
#include <new>

#include "headroom/core/view.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace headroom::inline v0::core {

/// Memory aligned to a cache line, uninitialised.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(Index bytes)
      : data_(static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), kAlignment))) {}
  std::byte* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Release> data_;
};

/// Who runs the tasks of an algorithm, and where its workspace comes from.
///
/// `run(tasks, body)` calls `body(task, worker)` once for each task in [0, tasks), with worker in [0, workers()), and
/// no two calls at a time on one worker. Tasks *start* in ascending order, so a task may wait for an earlier one. What
/// a task throws, `run` throws at its end; one that others wait for must not throw. `allocate(bytes)` owns a block of
/// 64-byte aligned memory at `data()`.
template <class E>
concept Executor = requires(const E& executor, Index n, void (*body)(Index, int)) {
  { executor.workers() } -> std::convertible_to<int>;
  { executor.allocate(n).data() } -> std::convertible_to<std::byte*>;
  executor.run(n, body);
};

/// All tasks on the calling thread.
struct SerialExecutor {
  int workers() const { return 1; }
  AlignedBuffer allocate(Index bytes) const { return AlignedBuffer(bytes); }
  template <class Body>
  void run(Index tasks, Body&& body) const {
    for (Index task = 0; task < tasks; ++task) body(task, 0);
  }
};

#ifdef _OPENMP
/// Tasks on OpenMP's threads (OMP_NUM_THREADS of them unless told otherwise).
struct OpenMpExecutor {
  int threads = omp_get_max_threads();

  int workers() const { return threads; }
  AlignedBuffer allocate(Index bytes) const { return AlignedBuffer(bytes); }
  template <class Body>
  void run(Index tasks, Body&& body) const {
    std::exception_ptr error;  // the first; none may leave the parallel region
#pragma omp parallel for schedule(monotonic : dynamic, 1) num_threads(threads)
    for (Index task = 0; task < tasks; ++task) {
      try {
        body(task, omp_get_thread_num());
      } catch (...) {
#pragma omp critical(headroom_executor)
        if (error == nullptr) error = std::current_exception();
      }
    }
    if (error != nullptr) std::rethrow_exception(error);
  }
};
using DefaultExecutor = OpenMpExecutor;
#else
using DefaultExecutor = SerialExecutor;
#endif

}  // namespace headroom::inline v0::core
