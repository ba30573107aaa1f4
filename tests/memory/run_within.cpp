#include "headroom/memory/run_within.hpp"

#include <torch/torch.h>

#include <map>
#include <new>
#include <string>
#include <vector>

#include "headroom/nn.hpp"
#include "support/catch.hpp"
#include "support/one_thread.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::check_equal;
using testing::contains;
using torch::Tensor;

namespace {

/// What a step can leave behind when it fails: oneDNN's memory, running statistics, dropout, a checkpoint, tiled
/// attention and its workspace.
struct NetImpl : torch::nn::Module {
  NetImpl() {
    conv = register_module("conv", torch::nn::Conv1d(torch::nn::Conv1dOptions(2, 16, 5).padding(2)));
    norm = register_module("norm", torch::nn::BatchNorm1d(16));
    dropout = register_module("dropout", torch::nn::Dropout(0.3));
    encoder = register_module("encoder", nn::Encoder(nn::EncoderOptions(16, 2, {24}, 2).gradient_checkpointing(true)));
  }
  Tensor forward(const Tensor& x) { return encoder(dropout(norm(conv(x))).transpose(1, 2)); }  // [B,2,L] -> [B,L,16]

  torch::nn::Conv1d conv{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
  nn::Encoder encoder{nullptr};
};
TORCH_MODULE(Net);

/// All that a step changes, by name; `random` is what the generator gives next.
std::map<std::string, Tensor> state_of(const Net& net) {
  std::map<std::string, Tensor> state;
  for (const auto& entry : net->named_parameters()) {
    const Tensor gradient = entry.value().grad();
    if (gradient.defined()) state["gradient of " + entry.key()] = gradient.clone();
  }
  for (const auto& entry : net->named_buffers()) state[entry.key()] = entry.value().clone();
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  state["random"] = generator.get_state().clone();
  return state;
}

const auto backward = [](Net& net, const Tensor& x, int64_t size) {
  for (const Tensor& part : x.split(size)) {
    (net(part).square().mean() * part.size(0) / x.size(0)).backward();
  }
};

/// A net with the state that every run of a test starts from.
Net fresh_net(bool with_gradients, const Tensor& x) {
  torch::manual_seed(3);
  Net net;
  if (with_gradients) backward(net, x, 4);
  torch::manual_seed(11);
  return net;
}

}  // namespace

TEST_CASE("every allocation of a step may fail: the repeated step gives the bits of one that was never disturbed") {
  const testing::OneThread one_thread;
  const Tensor x = torch::randn({4, 2, 24}, at::make_generator<at::CPUGeneratorImpl>(1));
  const auto [first, second, with_gradients] =
      GENERATE(std::tuple(4, 4, false), std::tuple(4, 2, false), std::tuple(4, 1, true));
  CAPTURE(first, second, with_gradients);
  {
    Net warm_up = fresh_net(true, x);  // what LibTorch and the library make once
    for (const int64_t size : {4, 2, 1}) backward(warm_up, x, size);
  }
  MemoryMeter meter;
  Net undisturbed = fresh_net(with_gradients, x), at_once = fresh_net(with_gradients, x);
  const int64_t allocations = meter.measure([&] { backward(at_once, x, first); }).allocations;
  torch::manual_seed(11);
  const int64_t held = meter.measure([&] { backward(undisturbed, x, second); }).held();
  const auto expected = state_of(undisturbed);
  CHECK(allocations > 100);

  for (int64_t spared = 0; spared < allocations; ++spared) {
    CAPTURE(spared);
    Net net = fresh_net(with_gradients, x);
    std::vector<int64_t> attempted;
    const int64_t before = meter.live();
    const int64_t finished = run_within({}, *net, std::vector<int64_t>{first, second}, [&](int64_t size) {
      if (attempted.empty()) meter.fail_allocation(spared);
      attempted.push_back(size);
      backward(net, x, size);
    });
    REQUIRE(attempted == std::vector<int64_t>{first, second});
    CHECK(finished == second);
    CHECK(meter.live() - before == held);
    check_equal(state_of(net), expected);
  }
}

TEST_CASE("when no attempt finds memory the error passes through and nothing has changed") {
  const Tensor x = torch::randn({4, 2, 24});
  const bool with_gradients = GENERATE(false, true);
  Net net = fresh_net(with_gradients, x);
  {
    const torch::NoGradGuard guard;
    net(x);  // makes the table of rotary embedding, which stays
  }
  const auto before = state_of(net);
  MemoryMeter meter;
  const int64_t live = meter.live();
  std::vector<int64_t> attempted;
  const auto step = [&](int64_t size) {
    attempted.push_back(size);
    backward(net, x, size);
  };
  CHECK_THROWS_AS(run_within({.bytes = live + 40'000}, *net, halvings(4), step), c10::OutOfMemoryError);
  CHECK(attempted == std::vector<int64_t>{4, 2, 1});
  CHECK(meter.live() == live);
  check_equal(state_of(net), before);
}

TEST_CASE("a budget picks the largest part that fits, and ends with the step") {
  const Tensor x = torch::randn({8, 2, 64});
  Net net;
  const MemoryMeter meter;
  std::map<int64_t, int64_t> peaks;
  for (const int64_t size : halvings(8)) {
    net->zero_grad();
    backward(net, x, size);
    net->zero_grad();
    peaks[size] = meter.measure([&] { backward(net, x, size); }).added_peak();
  }
  for (const int64_t size : {8, 4, 2}) {
    net->zero_grad();
    const int64_t buffers = 1000;  // the copies that run_within takes: buffers and the generator's state
    const int64_t budget = meter.live() + peaks[size] + 5056 + buffers;
    REQUIRE(budget < meter.live() + peaks.at(2 * size > 8 ? size : 2 * size) + (size == 8 ? 10'000 : 0));
    const int64_t found = run_within({.bytes = budget}, *net, halvings(8), [&](int64_t n) { backward(net, x, n); });
    CHECK(found == size);
  }
  CHECK_NOTHROW(torch::empty({1 << 20}));
}

TEST_CASE("attempts may be anything; other errors pass through at once") {
  Net net;
  CHECK(run_within({}, *net, std::vector<std::string>{"plain", "checkpointed"}, [](const std::string& policy) {
          if (policy == "plain") throw std::bad_alloc();
        }) == "checkpointed");
  int calls = 0;
  CHECK_THROWS_AS(run_within({}, *net, halvings(4),
                             [&](int64_t) {
                               ++calls;
                               throw std::runtime_error("stop");
                             }),
                  std::runtime_error);
  CHECK(calls == 1);
  CHECK(testing::error_of([&] { run_within({}, *net, std::vector<int>{}, [](int) {}); }).id() ==
        "headroom.memory.run_within");
}

TEST_CASE("errors that say that memory ran out are recognised, others are not") {
  const auto thrown = [](auto&& f) {
    try {
      f();
    } catch (const std::exception& error) {
      return is_out_of_memory(error);
    }
    FAIL("expected an exception");
    return false;
  };
  // The system's own refusal: LibTorch's CPU allocator throws a plain c10::Error then
  CHECK(thrown([] { torch::empty({int64_t{1} << 50}, torch::kUInt8); }));
  CHECK(thrown([] { throw std::bad_alloc(); }));
  CHECK(thrown([] { TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate 80.89 GiB"); }));
  CHECK(
      thrown([] { TORCH_CHECK(false, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"); }));
  CHECK_FALSE(thrown([] { torch::zeros({2, 3}).matmul(torch::zeros({2, 3})); }));
  CHECK_FALSE(thrown([] { throw std::runtime_error("out of memory"); }));
}

TEST_CASE("an operation is repeated once, after the caches of its device were emptied") {
  struct Device final : c10::DeviceAllocator {
    int emptied = 0;
    c10::DataPtr allocate(std::size_t) override { return {}; }
    void copy_data(void*, const void*, std::size_t) const override {}
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override { ++emptied; }
    void recordStream(const c10::DataPtr&, c10::Stream) override {}
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
    void resetAccumulatedStats(c10::DeviceIndex) override {}
    void resetPeakStats(c10::DeviceIndex) override {}
  };
  static Device device;
  c10::Allocator* const before = c10::GetAllocator(c10::kPrivateUse1);
  c10::SetAllocator(c10::kPrivateUse1, &device);
  int calls = 0;
  run_twice_if_out_of_memory(c10::kPrivateUse1, [&] {
    if (++calls == 1) throw std::bad_alloc();
  });
  CHECK(calls == 2);
  CHECK(device.emptied == 1);
  CHECK_THROWS_AS(run_twice_if_out_of_memory(c10::kPrivateUse1, [] { throw std::bad_alloc(); }), std::bad_alloc);
  c10::SetAllocator(c10::kPrivateUse1, before);
}
