// Who runs tasks: what they throw.

#include "headroom/core/executor.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

#include "support/catch.hpp"

using namespace headroom::core;

namespace {

/// What `run` throws of tasks of which two fail, and how many were begun.
template <class E>
std::string error_of_two(const E& executor, std::atomic<int>& begun) {
  try {
    executor.run(20, [&](Index task, int) {
      ++begun;
      if (task == 7 || task == 11) throw std::runtime_error("task " + std::to_string(task));
    });
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing";
}

}  // namespace

TEST_CASE("what a task throws comes out of run", "[threads]") {
  std::atomic<int> begun = 0;
  CHECK(error_of_two(SerialExecutor{}, begun) == "task 7");
  CHECK(begun == 8);
#ifdef _OPENMP
  for (const int threads : {1, 2, 5}) {
    CAPTURE(threads);
    begun = 0;
    const std::string error = error_of_two(OpenMpExecutor{threads}, begun);
    CHECK((error == "task 7" || error == "task 11"));
    CHECK(begun == 20);
  }
#endif
}
