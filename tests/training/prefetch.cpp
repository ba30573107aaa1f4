#include "headroom/training/prefetch.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/training/state.hpp"
#include "headroom/training/trainer.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_training.hpp"

using namespace headroom;
using testing::error_of;
using testing::noise_examples;
using training::BatchSource;
using training::Example;
using training::Prefetch;

namespace {

Example short_noise(int64_t first, int64_t count) { return noise_examples(first, count, 64); }

bool equal(const Example& a, const Example& b) {
  return torch::equal(a.mixture, b.mixture) && torch::equal(a.stems, b.stems);
}

}  // namespace

TEST_CASE("examples that are read ahead are those of the source, with any threads, in any order") {
  const std::vector<std::pair<int64_t, int64_t>> asked = {{100, 2}, {102, 2}, {104, 1}, {105, 7}, {112, 2}, {100, 4},
                                                          {104, 2}, {106, 2}, {5, 3},   {8, 3},   {8, 3},   {0, 1}};
  for (const int64_t threads : {0, 1, 2, 5}) {
    for (const int64_t examples : {0, 1, 4, 16}) {
      Prefetch ahead(short_noise, {.examples = examples, .threads = threads});
      for (const auto& [first, count] : asked) {
        CAPTURE(threads, examples, first, count);
        CHECK(equal(ahead(first, count), short_noise(first, count)));
      }
    }
  }
}

TEST_CASE("no more is read ahead than was allowed, and what lies ahead is read once") {
  std::atomic<int64_t> last = -1, reads = 0;
  const BatchSource counted = [&](int64_t first, int64_t count) {
    int64_t seen = last;
    while (seen < first && !last.compare_exchange_weak(seen, first)) {
    }
    ++reads;
    return short_noise(first, count);
  };
  Prefetch ahead(counted, {.examples = 6, .threads = 3});
  for (int64_t step = 0; step < 40; ++step) {
    ahead(2 * step, 2);
    CHECK(last <= 2 * step + 1 + 6);
  }
  while (reads < 86) std::this_thread::yield();  // 80 and 6 ahead, though nobody asks for them
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(reads == 86);
  ahead(82, 2);  // 80 and 81 are passed over; nothing is read again
  while (reads < 90) std::this_thread::yield();
  CHECK(last == 89);
}

TEST_CASE("an error of a reader arrives at the example that failed, and a second attempt reads again") {
  std::atomic<int> failures = 0;
  const BatchSource failing = [&](int64_t first, int64_t count) {
    if (first == 5 && failures++ < 2) throw std::runtime_error("example 5 is damaged");
    return short_noise(first, count);
  };
  Prefetch ahead(failing, {.examples = 8, .threads = 2});
  for (int64_t index = 0; index < 5; ++index) CHECK(equal(ahead(index, 1), short_noise(index, 1)));
  CHECK_THROWS_WITH(ahead(5, 1), "example 5 is damaged");
  CHECK(equal(ahead(6, 2), short_noise(6, 2)));
  CHECK_THROWS_WITH(ahead(4, 4), "example 5 is damaged");
  CHECK(equal(ahead(4, 4), short_noise(4, 4)));
  CHECK(failures == 3);
}

#ifdef _OPENMP
TEST_CASE("a reader thread that has no memory to begin with ends the wait for its examples") {
  MemoryMeter meter;
  meter.fail_allocation(0);
  Prefetch ahead([](int64_t, int64_t) { return Example{}; }, {.threads = 1});
  CHECK_THROWS_AS(ahead(0, 1), c10::OutOfMemoryError);
  CHECK_THROWS_AS(ahead(0, 1), c10::OutOfMemoryError);
}
#endif

TEST_CASE("the end waits for the examples in work alone") {
  std::atomic<int> reads = 0;
  {
    Prefetch ahead(
        [&](int64_t first, int64_t count) {
          ++reads;
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
          return short_noise(first, count);
        },
        {.examples = 100000, .threads = 2});
    ahead(0, 1);
  }
  CHECK(reads < 1000);
  Prefetch never_asked(short_noise, {.examples = 4, .threads = 2});
}

TEST_CASE("a reader thread has one thread for LibTorch and leaves signals to others") {
  const int before = at::get_num_threads();
  at::set_num_threads(4);
  std::atomic<int> most = 0;
  std::atomic<bool> interrupted = false;
  {
    Prefetch ahead(
        [&](int64_t first, int64_t count) {
          torch::ones({1 << 20}).mul_(2).sum();  // enough for several threads
          most = std::max(most.load(), at::get_num_threads());
          sigset_t blocked;
          ::pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
          if (!::sigismember(&blocked, SIGINT)) interrupted = true;
          return short_noise(first, count);
        },
        {.examples = 4, .threads = 2});
    ahead(0, 8);
  }
  CHECK(most == 1);
  CHECK_FALSE(interrupted);
  CHECK(at::get_num_threads() == 4);
  at::set_num_threads(before);
}

TEST_CASE("a trainer that is read ahead for ends with the same bits, also when it goes on from a state") {
  const training::Config config = testing::tiny_config({{"training", {{"gradient_accumulation_steps", 2}}}});
  const auto trained = [&](int64_t threads, std::vector<int64_t> stops) {
    torch::manual_seed(7);
    testing::TinySeparator model(6);
    const testing::TemporaryFolder folder;
    bool resumes = false;
    for (const int64_t stop : stops) {
      Prefetch ahead(testing::noise_source, {.examples = 4, .threads = threads});
      training::Trainer trainer(model, config, std::ref(ahead));
      if (std::exchange(resumes, true)) trainer.resume(training::load_state(folder / "last.pt"), "last.pt");
      trainer.run({.steps = stop, .folder = folder.path()});
    }
    return torch::cat({model->first->weight.flatten(), model->last->weight.flatten()}).detach();
  };
  const torch::Tensor expected = trained(0, {7});
  CHECK(torch::equal(trained(1, {7}), expected));
  CHECK(torch::equal(trained(3, {7}), expected));
  CHECK(torch::equal(trained(2, {3, 5, 7}), trained(0, {3, 5, 7})));
}

TEST_CASE("read-ahead options are checked") {
  for (const training::PrefetchOptions& options :
       std::vector<training::PrefetchOptions>{{.examples = -1}, {.threads = -1}, {.threads = 257}}) {
    CHECK(error_of([&] { Prefetch(short_noise, options); }).id() == "headroom.training.prefetch");
  }
}
