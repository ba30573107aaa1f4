// Everything of the library that starts threads or is used by several of them at a time and lies above core, for the
// thread sanitizer: readers of examples, the arena of tensors and meters of memory. scripts/harden.sh builds and runs
// this; it prints nothing but what is wrong.

#include <torch/torch.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <thread>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "headroom/memory/tensor_arena.hpp"
#include "headroom/training/prefetch.hpp"

using namespace headroom;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "wrong: " << what << '\n';
  std::exit(1);
}

training::Example example(std::int64_t index) {
  const auto value = static_cast<float>(index);
  return {torch::full({1, 2, 64}, value), torch::full({1, 3, 2, 64}, value)};
}

/// Readers of several threads, asked forwards, backwards and far ahead, for examples some of which cannot be read, and
/// ended while they read.
void read_ahead(std::int64_t threads) {
  std::atomic<std::int64_t> read = 0;
  const auto source = [&](std::int64_t first, std::int64_t) {
    ++read;
    if (first == 13) throw std::runtime_error("no such example");
    return example(first);
  };
  training::Prefetch ahead(source, {.examples = 6, .threads = threads});
  for (const std::int64_t first : {0, 2, 4, 6, 2, 100, 102, 0, 14}) {
    const training::Example batch = ahead(first, 2);
    expect(batch.mixture.size(0) == 2 && batch.mixture[1].mean().item<double>() == static_cast<double>(first + 1),
           "a batch has the examples that were asked for");
  }
  bool thrown = false;
  try {
    ahead(12, 2);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown && read >= 18, "what a source throws comes where the example is asked for");
}

/// Tensors that one thread makes and another one frees, while meters come and go.
void share_tensors() {
  constexpr int kThreads = 4, kRounds = 300;
  std::array<std::atomic<torch::Tensor*>, 8> shared{};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kRounds; ++i) {
        MemoryMeter meter;
        const std::int64_t size = (std::int64_t{1} << (4 + (i * 7 + thread) % 17)) + i;
        auto* mine = new torch::Tensor(torch::empty({size}));
        mine->data_ptr<float>()[size - 1] = static_cast<float>(i);
        expect(meter.peak() >= size * 4, "a meter sees what its thread allocates");
        delete shared[static_cast<std::size_t>(i + thread) % shared.size()].exchange(mine);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& one : shared) delete one.load();
}

}  // namespace

int main() {
  TensorArena::install();
  for (const std::int64_t threads : {1, 4}) read_ahead(threads);
  share_tensors();
  std::cout << "threads of the library: done\n";
}
