#include "headroom/memory/snapshot.hpp"

#include <sys/wait.h>
#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "headroom/memory/meter.hpp"
#include "headroom/memory/summary.hpp"
#include "support/catch.hpp"

using namespace headroom;
using testing::contains;

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
  const std::filesystem::path file = std::filesystem::temp_directory_path() / "headroom_snapshot.pickle";
  std::ofstream(file, std::ios::binary) << snapshot;
  // The reader needs no PyTorch: it is loaded as a file
  const std::string script = R"(
import importlib.util, pickle, re, sys
spec = importlib.util.spec_from_file_location('viz', sys.argv[1])
viz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(viz)
data = pickle.load(open(sys.argv[2], 'rb'))
segments, trace = viz.segsum(data), viz.trace(data)  # assert that the sums agree
page = viz.trace_plot(data) + viz.segment_plot(data)
flames = viz.memory(data, format_flamegraph=lambda lines: lines)
live = peak = ooms = 0
sizes = {}
for e in data['device_traces'][0]:
    if e['action'] == 'alloc':
        assert e['addr'] not in sizes
        sizes[e['addr']] = e['size']
        live += e['size']
    elif e['action'] == 'free_completed':
        assert sizes.pop(e['addr']) == e['size']
        live -= e['size']
    ooms += e['action'] == 'oom'
    peak = max(peak, live)
active = [b for s in data['segments'] for b in s['blocks'] if b['state'] == 'active_allocated']
assert {b['address']: b['requested_size'] for b in active} == sizes
print(sum(s['total_size'] for s in data['segments']), sum(b['requested_size'] for b in active), peak, live, ooms)
print(flames)
)";
  const std::filesystem::path program = std::filesystem::temp_directory_path() / "headroom_snapshot.py";
  std::ofstream(program) << script;
  const std::string reader = std::string(HEADROOM_MEMORY_VIZ);
  const std::string command = "python3 " + program.string() + " " + reader + " " + file.string() + " 2>&1";
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
    CHECK(whole.live == 0);
    CHECK(whole.reserved == planned.reserved_bytes);  // the cache keeps it
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

TEST_CASE("the summary of an allocator's statistics has the figures of torch.cuda.memory_summary") {
  c10::CachingDeviceAllocator::DeviceStats stats;
  stats.allocated_bytes[0].increase(int64_t{3} << 30);
  stats.allocated_bytes[0].decrease(int64_t{1} << 30);
  stats.reserved_bytes[0].increase(int64_t{5} << 30);
  stats.allocation[0].increase(12);
  stats.num_ooms = 4;
  const std::string text = memory_summary(stats, "CUDA", 1);
  INFO(text);
  CHECK(contains(text, "| Allocated memory      |   2048 MiB |   3072 MiB |   3072 MiB |   1024 MiB |"));
  CHECK(contains(text, "| Reserved memory       |   5120 MiB |   5120 MiB |   5120 MiB |      0 B   |"));
  CHECK(contains(text, "| Allocations           |      12   |      12   |      12   |       0   |"));
  CHECK(contains(text, "OOMs: 4"));
  CHECK(contains(text, "device ID 1"));
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) CHECK(line.size() == 77);
}
