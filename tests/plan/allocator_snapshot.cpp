#include "headroom/plan/allocator_snapshot.hpp"

#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <sstream>
#include <string>

#include "headroom/memory/meter.hpp"
#include "headroom/memory/summary.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using testing::contains;

#ifdef HEADROOM_SNAPSHOT_READER

namespace {

void step() {
  torch::nn::Sequential net(torch::nn::Linear(300, 2000), torch::nn::GELU(), torch::nn::Linear(2000, 30));
  name_modules(*net);
  for (int i = 0; i < 2; ++i) {
    net->zero_grad();
    net->forward(torch::ones({1000, 300})).square().mean().backward();
  }
}

/// Totals of a snapshot as PyTorch's own reader, torch/cuda/_memory_viz.py, and a walk along its trace find them.
struct Totals {
  int64_t reserved, allocated, trace_peak, live, ooms;
  std::string text;
};
Totals read_by_pytorch(const std::string& snapshot) {
  const testing::TemporaryFolder folder;
  const std::filesystem::path file = folder / "snapshot.pickle";
  testing::write_bytes(file, snapshot);
  const std::string command = HEADROOM_SNAPSHOT_READER " " + file.string() + " 2>&1";
  FILE* const pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string output;
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output += static_cast<char>(c);
  INFO(output);
  REQUIRE(pclose(pipe) == 0);
  std::istringstream in(output);
  Totals totals{};
  in >> totals.reserved >> totals.allocated >> totals.trace_peak >> totals.live >> totals.ooms;
  REQUIRE(in);
  totals.text = output;
  return totals;
}

}  // namespace

TEST_CASE("PyTorch's memory viewer reads a plan, and its totals are those of the plan") {
  for (const bool expandable : {false, true}) {
    CAPTURE(expandable);
    DeviceProfile card = device_profile("rtx-4090-24gb");
    card.expandable_segments = expandable;
    const Plan planned = plan(step, card);
    const Totals whole = read_by_pytorch(plan_snapshot(planned));
    CHECK(whole.trace_peak == planned.peak_bytes);
    CHECK(whole.live == 2 * 4 * (300 * 2000 + 2000 + 2000 * 30 + 30));  // a trace keeps the parameters it names
    CHECK(whole.reserved == planned.reserved_bytes);                    // the cache keeps it
    CHECK(whole.ooms == 0);
    const Totals at_peak = read_by_pytorch(plan_snapshot(planned, planned.peak_time));
    CHECK(at_peak.live == planned.peak_bytes);
    CHECK(at_peak.allocated == planned.peak_bytes);
    CHECK(contains(at_peak.text, ":aten::"));
  }
}

TEST_CASE("a snapshot of a plan that does not fit ends where memory runs out") {
  const Plan planned = plan(step, device_profile("rtx-4090-24gb"), {.budget = int64_t{20} << 20});
  REQUIRE_FALSE(planned.fits);
  const Totals totals = read_by_pytorch(plan_snapshot(planned));
  CHECK(totals.ooms == 1);
  CHECK(totals.live > 0);
  CHECK(totals.trace_peak < int64_t{20} << 20);
}

TEST_CASE("what really ran on the CPU is a snapshot, too") {
  step();
  const Plan real = measure_trace(step);
  const Totals totals = read_by_pytorch(plan_snapshot(real, real.peak_time));
  CHECK(totals.allocated == real.peak_bytes);
  CHECK(totals.reserved == real.peak_bytes);
}

#endif

TEST_CASE("the summary of an allocator's statistics has the figures of torch.cuda.memory_summary") {
  c10::CachingDeviceAllocator::DeviceStats stats;
  stats.allocated_bytes[0].increase(int64_t{3} << 30);
  stats.allocated_bytes[0].decrease(int64_t{1} << 30);
  stats.reserved_bytes[0].increase(int64_t{5} << 30);
  stats.allocation[0].increase(12);
  stats.num_ooms = 4;
  const std::string text = memory_summary(stats, c10::Device(c10::kCUDA, 1));
  INFO(text);
  CHECK(contains(text, "| Allocated memory      |   2048 MiB |   3072 MiB |   3072 MiB |   1024 MiB |"));
  CHECK(contains(text, "| Reserved memory       |   5120 MiB |   5120 MiB |   5120 MiB |      0 B   |"));
  CHECK(contains(text, "| Allocations           |      12    |      12    |      12    |       0    |"));
  CHECK(contains(text, "OOMs: 4"));
  CHECK(contains(text, "device ID 1"));
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) CHECK(line.size() == 77);
}

TEST_CASE("a meter has the same statistics of the CPU") {
  MemoryMeter meter;
  const auto before = meter.statistics();
  {
    const torch::Tensor a = torch::empty({int64_t{3} << 20}, torch::kUInt8);
    { const torch::Tensor b = torch::empty({int64_t{5} << 20}, torch::kUInt8); }
    const auto now = meter.statistics();
    CHECK(now.allocated_bytes[0].current - before.allocated_bytes[0].current == int64_t{3} << 20);
    CHECK(now.allocated_bytes[0].allocated - before.allocated_bytes[0].allocated == int64_t{8} << 20);
    CHECK(now.allocated_bytes[0].freed - before.allocated_bytes[0].freed == int64_t{5} << 20);
    CHECK(now.reserved_bytes[0].peak == meter.peak());
    CHECK(now.allocation[0].current - before.allocation[0].current == 1);
    CHECK(now.allocation[0].allocated - before.allocation[0].allocated == 2);
  }
  meter.reset_peak();
  CHECK(meter.statistics().allocated_bytes[0].peak == meter.live());
  CHECK(contains(memory_summary(meter), "LibTorch CPU memory summary"));
}
