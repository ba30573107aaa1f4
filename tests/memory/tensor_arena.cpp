#include "headroom/memory/tensor_arena.hpp"

#include <sys/resource.h>
#include <torch/torch.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "support/catch.hpp"

using headroom::TensorArena;

namespace {

constexpr std::size_t kMiB = 1 << 20;

void* take(std::size_t bytes) { return TensorArena::instance().raw_allocate(bytes); }
void give(void* data) { TensorArena::instance().raw_deallocate(data); }
std::byte* after(void* data, std::size_t bytes) { return static_cast<std::byte*>(data) + bytes; }

int64_t faults() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  return use.ru_minflt;
}

}  // namespace

TEST_CASE("the arena takes the highest range that holds a tensor, and ranges side by side become one") {
  void *c = take(2 * kMiB), *b = take(3 * kMiB - 5), *a = take(2 * kMiB), *end = take(kMiB);
  REQUIRE(b == after(a, 2 * kMiB));
  REQUIRE(c == after(b, 3 * kMiB));  // whole pages
  const int64_t reserved = TensorArena::instance().reserved();
  give(b);
  CHECK(take(kMiB) == after(b, 2 * kMiB));
  CHECK(take(2 * kMiB) == b);
  give(after(b, 2 * kMiB));
  give(b);
  CHECK(take(3 * kMiB) == b);
  for (const auto& order : std::vector<std::vector<void*>>{{a, b, c}, {c, b, a}, {b, a, c}, {a, c, b}}) {
    for (void* const block : order) give(block);
    CHECK(take(7 * kMiB) == a);
    give(a);
    CHECK(take(2 * kMiB) == c);
    CHECK(take(3 * kMiB) == b);
    CHECK(take(2 * kMiB) == a);
  }
  for (void* const block : {a, b, c, end}) give(block);
  CHECK(TensorArena::instance().reserved() == reserved);
}

TEST_CASE("a tensor that is larger than any free range gets memory of its own; small ones are malloc's") {
  const int64_t reserved = TensorArena::instance().reserved();
  void* const large = take(200 * kMiB);
  CHECK(TensorArena::instance().reserved() >= reserved + static_cast<int64_t>(100 * kMiB));
  give(large);
  const int64_t grown = TensorArena::instance().reserved();
  void* const again = take(200 * kMiB);
  CHECK(again == large);
  give(again);
  void* const small = take(TensorArena::kLeast - 1);
  std::memset(small, 1, TensorArena::kLeast - 1);
  give(small);
  give(take(0));
  CHECK(TensorArena::instance().reserved() == grown);
  // More than there are addresses: the error is that of LibTorch's own allocator
  CHECK_THROWS_WITH(take(std::size_t(1) << 60), Catch::Contains("can't allocate memory"));
}

TEST_CASE("a step that needs what the one before it needed touches no fresh page") {
  const auto step = [] {
    std::vector<void*> blocks;
    for (std::size_t i = 1; i <= 20; ++i) {
      blocks.push_back(take(i * kMiB));
      std::memset(blocks.back(), 1, i * kMiB);
      if (i % 3 == 0) give(std::exchange(blocks[i / 2], nullptr));
    }
    for (void* const block : blocks) give(block);
  };
  step();
  const int64_t reserved = TensorArena::instance().reserved(), before = faults();
  for (int i = 0; i < 10; ++i) step();
  CHECK(faults() - before < 500);  // of 512,000 pages that were written to
  CHECK(TensorArena::instance().reserved() == reserved);
}

TEST_CASE("threads take and give at the same time, also what another has taken") {
  std::vector<std::thread> threads;
  std::atomic<int> damaged = 0;
  std::vector<std::atomic<std::byte*>> shared(16);
  for (unsigned thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937 random(thread);
      for (int i = 0; i < 2000; ++i) {
        const std::size_t pages = 128 + random() % 512, bytes = pages * 4096;
        auto* block = static_cast<std::byte*>(take(bytes));
        const auto mark = static_cast<std::byte>(random() % 256);
        std::memcpy(block, &bytes, sizeof bytes);
        block[sizeof bytes] = block[bytes - 1] = mark;
        block = shared[random() % shared.size()].exchange(block);
        if (block == nullptr) continue;
        std::size_t size = 0;
        std::memcpy(&size, block, sizeof size);
        damaged += block[sizeof size] != block[size - 1];
        give(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& block : shared) {
    if (block != nullptr) give(block);
  }
  CHECK(damaged == 0);
}

TEST_CASE("an installed arena is where tensors lie, and a meter counts them as before") {
  c10::Allocator* const before = c10::GetAllocator(c10::kCPU);
  TensorArena::install();
  {
    headroom::MemoryMeter meter;
    torch::Tensor tensor;
    const auto report = meter.measure([&] { tensor = torch::ones({1 << 20}); });
    CHECK(report.held() == 4 << 20);
    void* const place = tensor.data_ptr();
    tensor.reset();
    CHECK(torch::ones({1 << 20}).data_ptr() == place);
  }
  CHECK(c10::GetAllocator(c10::kCPU) == &TensorArena::instance());
  c10::SetAllocator(c10::kCPU, before);
}
