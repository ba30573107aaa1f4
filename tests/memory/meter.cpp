#include "headroom/memory/meter.hpp"

#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <optional>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

Tensor bytes(std::int64_t n) { return torch::empty({n}, torch::kUInt8); }

/// A device allocator whose statistics a test moves by hand.
struct FakeDevice final : c10::DeviceAllocator {
  void add(std::int64_t n) {
    stats.allocated_bytes[0].increase(n);
    stats.reserved_bytes[0].increase(n);
    stats.allocation[0].increase(1);
  }
  void remove(std::int64_t n) { stats.allocated_bytes[0].decrease(n); }

  c10::DataPtr allocate(std::size_t) override { return {}; }
  void copy_data(void*, const void*, std::size_t) const override {}
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return stats; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { stats.allocated_bytes[0].reset_peak(); }

  c10::CachingDeviceAllocator::DeviceStats stats;
};

}  // namespace

TEST_CASE("a meter counts the exact bytes of storages") {
  MemoryMeter meter;
  const std::int64_t before = meter.live();
  {
    const Tensor a = torch::empty({3, 5}, torch::kFloat32);
    CHECK(meter.live() - before == 60);
    const Tensor view = a.view({15}).slice(0, 0, 4);
    CHECK(meter.live() - before == 60);
    const Tensor b = torch::empty({7}, torch::kFloat64);
    const Tensor nothing = torch::empty({0});
    CHECK(meter.live() - before == 116);
    CHECK(meter.allocations() == 2);
    CHECK(meter.largest() == 60);
    CHECK(meter.reserved() == meter.live());
  }
  CHECK(meter.live() == before);
  CHECK(meter.peak() - before == 116);
  meter.reset_peak();
  CHECK(meter.peak() == before);
  CHECK(meter.allocations() == 0);
  CHECK(meter.largest() == 0);
}

TEST_CASE("a report gives peak, held bytes, number and largest of the allocations") {
  const MemoryMeter meter;
  std::vector<Tensor> kept;
  const MemoryReport report = meter.measure([&] {
    kept.push_back(bytes(100));
    { const Tensor scratch = bytes(1000); }
    { const Tensor scratch = bytes(700), more = bytes(500); }
  });
  CHECK(report.held() == 100);
  CHECK(report.added_peak() == 1300);
  CHECK(report.allocations == 4);
  CHECK(*report.largest == 1000);
  CHECK(meter.measure([&] { kept.clear(); }).held() == -100);
}

TEST_CASE("windows nest: neither an inner measurement nor a reset changes what the outer one has seen") {
  MemoryMeter outer;
  const std::int64_t before = outer.live();
  const MemoryReport report = outer.measure([&] {
    { const Tensor high = bytes(5000); }
    const MemoryReport inner = outer.measure([&] { const Tensor low = bytes(300); });
    CHECK(inner.added_peak() == 300);
    CHECK(*inner.largest == 300);
    outer.reset_peak();
    const Tensor last = bytes(200);
  });
  CHECK(report.added_peak() == 5000);
  CHECK(report.allocations == 3);
  CHECK(outer.peak() - before == 200);
}

TEST_CASE("a measurement that throws leaves the meter usable") {
  const MemoryMeter meter;
  CHECK_THROWS_AS(meter.measure([] { throw std::runtime_error("stop"); }), std::runtime_error);
  CHECK(meter.measure([] { const Tensor x = bytes(10); }).added_peak() == 10);
}

TEST_CASE("allocations and frees of all threads are counted") {
  const MemoryMeter meter;
  std::vector<Tensor> tensors(8);
  const MemoryReport made = meter.measure([&] {
    std::vector<std::thread> threads;
    for (Tensor& slot : tensors) {
      threads.emplace_back([&slot] {
        for (int i = 0; i < 200; ++i) {
          slot = Tensor();
          slot = bytes(1000);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  });
  CHECK(made.held() == 8000);
  CHECK(made.added_peak() == 8000);
  CHECK(made.allocations == 1600);
  CHECK(meter.measure([&] { std::thread([&] { tensors.clear(); }).join(); }).held() == -8000);
}

TEST_CASE("the CPU allocator is replaced on demand and restored; tensors may cross both moments") {
  c10::Allocator* const stock = c10::GetAllocator(c10::kCPU);
  Tensor older = bytes(1000);
  Tensor younger;
  std::int64_t left = 0;
  {
    const MemoryMeter meter;
    CHECK(c10::GetAllocator(c10::kCPU) != stock);
    { const MemoryMeter second; }
    CHECK(c10::GetAllocator(c10::kCPU) != stock);
    CHECK(meter.measure([&] { older = Tensor(); }).held() == 0);
    younger = bytes(500);
    left = meter.live();
  }
  CHECK(c10::GetAllocator(c10::kCPU) == stock);
  const Tensor unseen = bytes(300);
  younger = Tensor();
  CHECK(MemoryMeter().live() == left - 500);
}

TEST_CASE("raw pointers, which go back through whichever allocator is installed, may cross too") {
  constexpr std::int64_t size = 64 << 20;  // above malloc's largest mmap threshold: its address comes back at once
  void* older = c10::GetAllocator(c10::kCPU)->raw_allocate(size);
  void* younger = nullptr;
  std::int64_t before = 0;
  {
    const MemoryMeter meter;
    before = meter.live();
    c10::GetAllocator(c10::kCPU)->raw_deallocate(older);
    CHECK(meter.live() == before);
    younger = c10::GetAllocator(c10::kCPU)->raw_allocate(size);
    CHECK(meter.live() == before + size);
  }
  c10::GetAllocator(c10::kCPU)->raw_deallocate(younger);  // no meter sees that
  {
    const MemoryMeter meter;
    CHECK(meter.live() == before + size);
    const Tensor x = bytes(size);
    REQUIRE(x.data_ptr() == younger);
    CHECK(meter.live() == before + size);  // noticed, for the address is in use again
  }
  CHECK(MemoryMeter().live() == before);
}

TEST_CASE("a CPU allocator of higher priority is left alone") {
  // Priorities cannot be lowered again, so this happens in a child process
  const pid_t child = fork();
  if (child == 0) {
    c10::SetAllocator(c10::kCPU, c10::GetAllocator(c10::kCPU), 1);
    int code = 1;
    try {
      const MemoryMeter meter;
    } catch (const Error& error) {
      code = error.id() == "headroom.memory.allocator" ? 0 : 2;
    }
    _exit(code);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("memory comes aligned as LibTorch's and survives resizing") {
  const MemoryMeter meter;
  Tensor x = torch::arange(10);
  CHECK(reinterpret_cast<std::uintptr_t>(x.data_ptr()) % 64 == 0);
  const MemoryReport grown = meter.measure([&] { x.resize_({1000}); });
  CHECK(grown.held() == 990 * 8);
  CHECK(x[9].item<std::int64_t>() == 9);
}

TEST_CASE("a limit throws LibTorch's out-of-memory error and leaks nothing") {
  MemoryMeter meter;
  const std::int64_t before = meter.live();
  const auto step = [] {
    const Tensor weight = torch::ones({64, 64}, torch::requires_grad());
    (torch::ones({64, 64}).matmul(weight).relu().matmul(weight)).sum().backward();
  };
  const MemoryReport free_run = meter.measure(step);
  for (const double share : {0.1, 0.5, 0.9, 0.999}) {
    meter.set_limit(before + static_cast<std::int64_t>(share * static_cast<double>(free_run.added_peak())));
    CHECK_THROWS_AS(step(), c10::OutOfMemoryError);
    CHECK(meter.live() == before);
  }
  meter.set_limit(before + free_run.added_peak());
  CHECK_NOTHROW(step());

  meter.set_limit(before + 1000);
  try {
    bytes(2048);
    FAIL("expected an out-of-memory error");
  } catch (const c10::OutOfMemoryError& error) {
    const std::string message = error.what();
    CHECK(testing::contains(message, "[headroom.memory.limit]"));
    CHECK(testing::contains(message, "tried to allocate 2.00 KiB"));
  }
  meter.reset_peak();
  CHECK_THROWS_AS(bytes(2048), c10::OutOfMemoryError);  // a reset keeps the limit
  meter.set_limit(std::nullopt);
  CHECK_NOTHROW(bytes(2048));
  CHECK(testing::error_of([&] { meter.set_limit(-1); }).id() == "headroom.memory.limit");
}

TEST_CASE("one allocation can be told to fail") {
  MemoryMeter meter;
  meter.fail_allocation(2);
  const Tensor first = bytes(10), second = bytes(20), none = bytes(0);
  CHECK_THROWS_AS(bytes(30), c10::OutOfMemoryError);
  CHECK_NOTHROW(bytes(30));
  meter.fail_allocation(0);
  CHECK_THROWS_WITH(bytes(30), Catch::Contains("tried to allocate 30 B") && Catch::Contains("fail_allocation"));
  CHECK(testing::error_of([&] { meter.fail_allocation(-1); }).id() == "headroom.memory.limit");
}

TEST_CASE("a limit ends with its meter") {
  const MemoryMeter outer;
  {
    MemoryMeter inner;
    inner.set_limit(0);
    CHECK_THROWS_AS(bytes(1), c10::OutOfMemoryError);
  }
  CHECK_NOTHROW(bytes(1));
}

TEST_CASE("a device that is not there is an error that names it") {
  if (at::getAccelerator(false).has_value()) {
    WARN("skipped: this machine has an accelerator");
    return;
  }
  const Error error = testing::error_of([] { MemoryMeter(c10::Device(c10::kCUDA, 0)); });
  CHECK(error.id() == "headroom.memory.device");
  CHECK(testing::contains(error.what(), "cuda:0"));
}

TEST_CASE("on an accelerator the one peak of the device is shared out to nested windows") {
  static FakeDevice fake;
  c10::SetAllocator(c10::kPrivateUse1, &fake);
  const c10::Device device(c10::kPrivateUse1, 0);
  fake.add(50);
  MemoryMeter outer(device);
  const MemoryReport report = outer.measure([&] {
    fake.add(1000);
    fake.remove(1000);
    const MemoryReport inner = outer.measure([&] {
      fake.add(10);
      fake.remove(4);
    });
    CHECK(inner.live_before == 50);
    CHECK(inner.added_peak() == 10);
    CHECK(inner.held() == 6);
    CHECK(inner.allocations == 1);
    CHECK_FALSE(inner.largest.has_value());
  });
  CHECK(report.added_peak() == 1000);
  CHECK(report.allocations == 2);
  CHECK(outer.peak() == 1050);
  outer.reset_peak();
  CHECK(outer.peak() == 56);
  CHECK(outer.allocations() == 0);
  CHECK(outer.live() == 56);
  CHECK(outer.reserved() == 1060);
  CHECK(testing::error_of([&] { outer.largest(); }).id() == "headroom.memory.unsupported");
  CHECK(testing::error_of([&] { outer.set_limit(1); }).id() == "headroom.memory.unsupported");
}
