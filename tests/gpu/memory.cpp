#include "headroom/memory.hpp"

#include <dlfcn.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <string>
#include <vector>

#include "gpu/device.hpp"
#include "headroom/nn.hpp"
#include "support/files.hpp"

using namespace headroom;
using namespace headroom::testing;
using torch::Tensor;

namespace {

c10::DeviceAllocator& device_allocator() {
  return *dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(test_device().type()));
}
int64_t free_bytes() {
  return static_cast<int64_t>(at::accelerator::getMemoryInfo(at::accelerator::getDeviceIndex()).first);
}

/// Takes all memory of the device but about `rest` bytes while it lives: what a smaller card has. The driver has more
/// than it says, so memory is taken until there is none, and some given back.
class Ballast {
 public:
  explicit Ballast(int64_t rest) {
    constexpr int64_t kPiece = int64_t{32} << 20;
    device_allocator().emptyCache();
    const auto take = [&](int64_t bytes) {
      taken_.push_back(torch::empty({bytes}, torch::TensorOptions(test_device()).dtype(torch::kByte)));
    };
    take(std::max<int64_t>(free_bytes() - (int64_t{1} << 30), kPiece) >> 21 << 21);
    try {
      for (;;) take(kPiece);
    } catch (const c10::OutOfMemoryError&) {
    }
    for (; rest > 0 && taken_.size() > 1; rest -= kPiece) taken_.pop_back();
    device_allocator().emptyCache();
  }
  ~Ballast() {
    taken_.clear();
    device_allocator().emptyCache();
  }
  Ballast(const Ballast&) = delete;
  Ballast& operator=(const Ballast&) = delete;

 private:
  std::vector<Tensor> taken_;
};

}  // namespace

TEST_CASE("a meter reads the device's allocator: bytes, peaks, windows", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  const auto bytes = [](int64_t count) {
    return torch::empty({count}, torch::TensorOptions(test_device()).dtype(torch::kByte));
  };
  MemoryMeter meter(test_device());
  const int64_t before = meter.live();
  Tensor kept;
  const MemoryReport report = meter.measure([&] {
    kept = bytes(1000);  // rounded up to 1024
    bytes(3 << 20);      // gone again
    bytes(1 << 20);
  });
  CHECK(report.live_before == before);
  CHECK(report.held() == 1024);
  CHECK(report.added_peak() == 1024 + (3 << 20));
  CHECK(report.allocations == 3);
  CHECK_FALSE(report.largest.has_value());
  CHECK(meter.reserved() >= meter.live());
  CHECK(meter.measure([&] { kept = Tensor(); }).held() == -1024);
  MemoryMeter inner(test_device());
  bytes(5 << 20);
  inner.reset_peak();
  CHECK(inner.peak() == inner.live());
  CHECK(meter.peak() >= before + (5 << 20));  // a window that was reset leaves the others alone
  CHECK(error_of([&] { meter.set_limit(1); }).id() == "headroom.memory.unsupported");
}

TEST_CASE("memory_summary prints the device's statistics", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  MemoryMeter meter(test_device());
  const Tensor x = torch::empty({64 << 20}, torch::TensorOptions(test_device()).dtype(torch::kByte));
  const auto stats = meter.statistics();
  CHECK(stats.allocated_bytes[0].current >= 64 << 20);
  CHECK(stats.reserved_bytes[0].current >= stats.allocated_bytes[0].current);
  const std::string text = memory_summary(meter);
  CHECK(contains(text, "Allocated memory"));
  CHECK(contains(text, std::to_string(stats.allocated_bytes[0].current >> 10) + " KiB"));
}

TEST_CASE("LibTorch's snapshot of the device knows what a meter saw", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  // torch::cuda::_memory_snapshot_pickled of the library for the device, which need not be there when this is linked
  using Snapshot = std::string (*)();
  const auto snapshot =
      reinterpret_cast<Snapshot>(dlsym(RTLD_DEFAULT, "_ZN5torch4cuda24_memory_snapshot_pickledB5cxx11Ev"));
  REQUIRE(snapshot != nullptr);
  const Tensor x = torch::empty({77 << 20}, torch::TensorOptions(test_device()).dtype(torch::kByte));
  const std::string pickled = snapshot();
  const c10::IValue content = torch::jit::unpickle(pickled.data(), pickled.size());
  int64_t active = 0;
  bool found = false;
  for (const auto& segment : content.toGenericDict().at("segments").toListRef()) {
    active += segment.toGenericDict().at("allocated_size").toInt();
    for (const auto& block : segment.toGenericDict().at("blocks").toListRef()) {
      found = found || block.toGenericDict().at("size").toInt() == 77 << 20;
    }
  }
  CHECK(found);
  CHECK(active == MemoryMeter(test_device()).live());
}

TEST_CASE("run_within halves a batch until a real device has the memory, and leaves the bits of an undisturbed step",
          "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  const Deterministic deterministic;
  torch::manual_seed(41);
  nn::Encoder encoder(nn::EncoderOptions(64, 4, {256}, 4));
  encoder->to(test_device());
  const Tensor x = torch::randn({16, 1024, 64}).to(test_device());
  std::vector<int64_t> tried;
  const auto step = [&](int64_t size) {
    tried.push_back(size);
    for (const Tensor& part : x.split(size)) {
      encoder->forward(torch::dropout(part, 0.1, true)).square().mean().mul(part.size(0) / 16.0).backward();
    }
  };
  const auto gradients = [&] {
    std::vector<Tensor> all;
    for (const Tensor& p : encoder->parameters()) all.push_back(p.grad().clone());
    encoder->zero_grad();
    return all;
  };
  step(16), gradients();  // libraries make their workspace
  MemoryMeter meter(test_device());
  torch::manual_seed(42);
  const int64_t whole = meter.measure([&] { step(16); }).added_peak();
  gradients();
  tried.clear();
  int64_t size = 0;
  {
    const Ballast ballast(whole / 4);
    torch::manual_seed(42);
    size = run_within({.device = test_device()}, *encoder, halvings(16), step);
  }
  CAPTURE(whole, size);
  CHECK(size < 16);
  CHECK(tried.size() >= 2);
  const auto actual = gradients();
  torch::manual_seed(42);
  step(size);
  const auto expected = gradients();
  for (size_t i = 0; i < expected.size(); ++i) CHECK(actual[i].equal(expected[i]));
}

TEST_CASE("an error of a full device is an out-of-memory error, and nothing is left behind", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  MemoryMeter meter(test_device());
  const int64_t before = meter.live();
  const Ballast ballast(int64_t{256} << 20);
  try {
    torch::empty({int64_t{1} << 30}, torch::TensorOptions(test_device()).dtype(torch::kByte));
    FAIL("1 GiB of 256 MiB");
  } catch (const std::exception& error) {
    CHECK(is_out_of_memory(error));
    CHECK(contains(error.what(), "Tried to allocate 1024.00 MiB"));
  }
  CHECK(meter.statistics().num_ooms >= 1);
  CHECK(meter.live() >= before);
}
