#include "headroom/plan/plan.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "headroom/audio.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/plan/report_html.hpp"
#include "headroom/plan/report_json.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

DeviceProfile cpu() { return this_machine(); }

/// Peak of a step as it really is.
template <class Step>
int64_t measured_peak(const Step& step) {
  return MemoryMeter().measure(step).added_peak();
}

/// Forward, backward and two steps of AdamW of a module on an input of a shape.
template <class Module>
auto training_of(const std::function<Module()>& make, std::vector<int64_t> shape) {
  return [=] {
    Module module = make();
    name_modules(*module);
    torch::optim::AdamW optimizer(module->parameters());
    for (int step = 0; step < 2; ++step) {
      optimizer.zero_grad();
      const Tensor x = torch::randn(shape).requires_grad_();
      module->forward(x).square().mean().backward();
      torch::nn::utils::clip_grad_norm_(module->parameters(), 1.0);
      const Phase phase("optimizer");
      optimizer.step();
    }
  };
}

template <class Module>
void check_exact(const std::function<Module()>& make, const std::vector<int64_t>& shape) {
  const auto step = training_of<Module>(make, shape);
  const int64_t measured = measured_peak(step);
  CHECK(plan(step, cpu(), {.value = 1}).peak_bytes == measured);
}

}  // namespace

TEST_CASE("the planned peak of a training step of every nn module is the measured one, byte for byte") {
  torch::manual_seed(1);
  SECTION("norm") {
    check_exact<nn::RMSNorm>([] { return nn::RMSNorm(48); }, {3, 50, 48});
  }
  SECTION("linear") {
    check_exact<nn::Linear>([] { return nn::Linear(48, 40); }, {3, 500, 48});
  }
  SECTION("linear, less than one chunk") {
    check_exact<nn::Linear>([] { return nn::Linear(7, 5); }, {11, 7});
  }
  SECTION("feed-forward") {
    check_exact<nn::FeedForward>([] { return nn::FeedForward(nn::FeedForwardOptions(48, {96, 80})); }, {3, 700, 48});
  }
  SECTION("attention") {
    for (const bool causal : {false, true}) {
      check_exact<nn::SelfAttention>(
          [=] { return nn::SelfAttention(nn::SelfAttentionOptions(48, 3).request(AttentionOptions().causal(causal))); },
          {3, 50, 48});
    }
  }
  SECTION("encoder") {
    for (const bool checkpointing : {false, true}) {
      nn::EncoderOptions options(48, 3, {96}, 3);
      options.gradient_checkpointing(checkpointing);
      check_exact<nn::Encoder>([=] { return nn::Encoder(options); }, {3, 50, 48});
    }
  }
  SECTION("axial encoder") {
    for (const bool checkpointing : {false, true}) {
      nn::EncoderOptions options(24, 2, {40}, 2);
      options.gradient_checkpointing(checkpointing);
      check_exact<nn::AxialEncoder>(
          [=] {
            return nn::AxialEncoder(options, nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}});
          },
          {2, 9, 13, 24});
    }
  }
}

TEST_CASE("a step in double or bfloat16 is planned byte for byte, with and without recomputation") {
  torch::manual_seed(2);
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16);
  for (const bool checkpointing : {false, true}) {
    const auto step = [=] {
      nn::EncoderOptions options(48, 3, {96, 64}, 2);
      options.gradient_checkpointing(checkpointing);
      nn::AxialEncoder encoder(options, nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}});
      encoder->to(type);
      encoder->forward(torch::randn({2, 19, 23, 48}, type).requires_grad_()).square().mean().backward();
    };
    CAPTURE(type, checkpointing);
    const int64_t measured = measured_peak(step);
    CHECK(plan(step, cpu(), {.value = 1}).peak_bytes == measured);
  }
}

TEST_CASE("what depends on the moment is planned at its most") {
  const auto fits_within = [](int64_t planned, int64_t measured, int64_t slack) {
    CHECK(planned >= measured);
    CHECK(planned <= measured + slack);
  };
  // LibTorch's fused kernel on the CPU: each thread makes a small tensor, at the same time or not
  const auto fused = training_of<nn::SelfAttention>(
      [] {
        const auto fused = AttentionOptions().backend(AttentionBackend::fused);
        return nn::SelfAttention(nn::SelfAttentionOptions(48, 3).request(fused));
      },
      {3, 50, 48});
  const int64_t measured = measured_peak(fused);
  fits_within(plan(fused, cpu(), {.value = 1}).peak_bytes, measured, 128 * at::get_num_threads());
}

TEST_CASE("products of shapes that this process has not seen are planned as they run") {
  for (const int64_t rows : {3, 300}) {
    const auto linear = training_of<nn::Linear>([] { return nn::Linear(1021, 517); }, {rows, 1021});
    const int64_t planned = plan(linear, cpu(), {.value = 1}).peak_bytes;
    CHECK(planned == MemoryMeter().measure(linear).added_peak());
  }
}

TEST_CASE("the planned peak of a module without gradients is the measured one") {
  const auto step = [] {
    const torch::NoGradGuard guard;
    nn::Encoder(nn::EncoderOptions(48, 3, {96}, 3))->forward(torch::randn({3, 50, 48}));
  };
  const int64_t measured = measured_peak(step);
  CHECK(plan(step, cpu()).peak_bytes == measured);
}

TEST_CASE("the planned peak of transforms and losses is the measured one") {
  const auto transform = [] {
    audio::Stft stft(audio::StftOptions().n_fft(512).hop(128));
    const Tensor x = torch::randn({2, 2, 5000}).requires_grad_();
    stft->inverse(stft->forward(x), 5000).square().sum().backward();
  };
  const int64_t of_transform = measured_peak(transform);
  CHECK(plan(transform, cpu()).peak_bytes == of_transform);
  const auto loss = [] {
    audio::SeparationLoss loss(audio::SeparationLossOptions().stft(
        audio::MultiResolutionStftLossOptions().windows({512, 256}).min_n_fft(512)));
    const Tensor x = torch::randn({2, 4, 2, 3000}).requires_grad_();
    loss->forward(x, torch::randn({2, 4, 2, 3000})).backward();
  };
  const int64_t of_loss = measured_peak(loss);
  CHECK(plan(loss, cpu()).peak_bytes == of_loss);
}

TEST_CASE("checkpointed and nested recomputation is planned as it runs") {
  const auto step = [] {
    std::vector<nn::EncoderBlock> blocks;
    for (int i = 0; i < 4; ++i) blocks.push_back(nn::EncoderOptions(32, 2, {64}, 1).block());
    const auto pair = [&](int first) {
      return [&blocks, first](const Tensor& x) {
        return checkpoint(
            [&blocks, first](const Tensor& y) { return blocks[first + 1]->forward(blocks[first]->forward(y)); }, x);
      };
    };
    const Tensor x = torch::randn({4, 60, 32}).requires_grad_();
    checkpoint([&pair](const Tensor& y) { return pair(2)(pair(0)(y)); }, x).sum().backward();
  };
  const int64_t measured = measured_peak(step);
  const Plan planned = plan(step, cpu());
  CHECK(planned.peak_bytes == measured);
  CHECK(planned.by_phase.contains("recomputation"));
}

TEST_CASE("recurrent layers are planned as the CPU runs them, byte for byte") {
  const auto check = [](const auto& step) {
    const int64_t measured = measured_peak(step);
    CHECK(plan(step, cpu()).peak_bytes == measured);
  };
  for (const bool bidirectional : {false, true}) {
    for (const bool batch_first : {false, true}) {
      CAPTURE(bidirectional, batch_first);
      check([&] {
        torch::nn::GRU net(torch::nn::GRUOptions(12, 20)
                               .num_layers(2)
                               .dropout(0.1)
                               .bidirectional(bidirectional)
                               .batch_first(batch_first));
        std::get<0>(net->forward(torch::randn({6, 9, 12}))).square().mean().backward();
      });
    }
  }
  check([] {
    torch::nn::RNN net(torch::nn::RNNOptions(12, 20).num_layers(2).bias(false).nonlinearity(torch::kTanh));
    std::get<0>(net->forward(torch::randn({6, 9, 12}))).square().mean().backward();
  });
  check([] {
    torch::nn::RNN net(torch::nn::RNNOptions(12, 20).nonlinearity(torch::kReLU));
    const torch::NoGradGuard guard;
    net->forward(torch::randn({6, 9, 12}));
  });
  const auto on_a_card = plan(
      [] {
        torch::nn::GRU net(12, 20);
        std::get<0>(net->forward(torch::randn({6, 9, 12}))).sum().backward();
      },
      device_profile("h100-80gb"));
  CHECK(on_a_card.peak_bytes > 0);
}

TEST_CASE("modules of LibTorch are planned within half a percent") {
  torch::manual_seed(1);
  const auto check = [](const auto& step) {
    const auto measured = static_cast<double>(measured_peak(step));
    CHECK(static_cast<double>(plan(step, cpu(), {.value = 1}).peak_bytes) == Approx(measured).epsilon(0.005));
  };
  SECTION("transformer") {
    check([] {
      torch::nn::Transformer model(torch::nn::TransformerOptions(64, 4, 2, 2).dim_feedforward(128).dropout(0.1));
      torch::optim::AdamW optimizer(model->parameters());
      for (int step = 0; step < 2; ++step) {
        optimizer.zero_grad();
        model->forward(torch::randn({40, 4, 64}), torch::randn({30, 4, 64})).square().mean().backward();
        optimizer.step();
      }
    });
  }
  SECTION("multilayer perceptron with norms and dropout") {
    check([] {
      torch::nn::Sequential model(torch::nn::Linear(64, 256), torch::nn::LayerNorm(torch::nn::LayerNormOptions({256})),
                                  torch::nn::ReLU(), torch::nn::Dropout(0.2), torch::nn::Linear(256, 64),
                                  torch::nn::PReLU(), torch::nn::BatchNorm1d(64), torch::nn::Linear(64, 10));
      torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
      for (int step = 0; step < 2; ++step) {
        optimizer.zero_grad();
        torch::cross_entropy_loss(model->forward(torch::randn({500, 64})), torch::randint(0, 10, {500}, torch::kLong))
            .backward();
        optimizer.step();
      }
    });
  }
}

TEST_CASE("the parts of a peak are its sum, by use, by module and by operator") {
  const Plan planned = plan(
      [] {
        nn::Encoder encoder(nn::EncoderOptions(48, 3, {96}, 2));
        name_modules(*encoder, "encoder");
        torch::optim::AdamW optimizer(encoder->parameters());
        for (int step = 0; step < 2; ++step) {
          optimizer.zero_grad();
          encoder->forward(torch::randn({3, 50, 48})).square().mean().backward();
          const Phase phase("optimizer");
          optimizer.step();
        }
      },
      cpu());
  const auto sum_of = [](const auto& table) {
    int64_t sum = 0;
    for (const auto& [name, bytes] : table) sum += bytes;
    return sum;
  };
  int64_t parts = 0;
  for (const int64_t bytes : planned.parts) parts += bytes;
  CHECK(parts == planned.peak_bytes);
  CHECK(sum_of(planned.by_module) == planned.peak_bytes);
  CHECK(sum_of(planned.by_operator) == planned.peak_bytes);

  int64_t parameters = 0;
  for (const Tensor& p : nn::Encoder(nn::EncoderOptions(48, 3, {96}, 2))->parameters()) parameters += p.nbytes();
  CHECK(planned.parts[static_cast<size_t>(MemoryUse::parameter)] == parameters);
  CHECK(planned.parts[static_cast<size_t>(MemoryUse::optimizer)] >= 2 * parameters);
  CHECK(planned.parts[static_cast<size_t>(MemoryUse::activation)] > 0);
  CHECK(planned.by_module.contains("encoder.layers.1.feed_forward.layers.0"));
  CHECK(planned.by_phase.at("backward") >= planned.by_phase.at("optimizer"));
  // Two layers of 2·rows·weights forward and twice that backward, and attention
  const double weights = 2 * (48 * 144 + 48 * 48 + 2 * 48 * 96), pairs = 2.0 * 3 * 3 * 50 * 50;
  CHECK(planned.flops / 2 == Approx(2 * 150 * weights * 3 + pairs * 2 * (16 + 16) + pairs * 2 * (3 * 16 + 2 * 16)));
}

TEST_CASE("a large step is planned without its memory") {
  const MemoryMeter meter;
  const Plan planned = plan(
      [] {
        const auto make = [] { return torch::randn({431, 12, 2049, 16}).requires_grad_(); };
        attention(make(), make(), make(), AttentionOptions().backend(AttentionBackend::reference)).sum().backward();
      },
      device_profile("rtx-pro-6000-97gb"));
  CHECK(planned.largest_block()->bytes == 86'856'519'888);
  CHECK(planned.largest_block()->shape == std::vector<int64_t>{431, 12, 2049, 2049});
  CHECK_FALSE(planned.fits);
  CHECK(testing::contains(explain(planned), "80.89 GiB [431, 12, 2049, 2049]"));
  CHECK(meter.peak() < 1 << 20);
}

TEST_CASE("planning leaves the process as it was, also when it fails") {
  torch::manual_seed(5);
  const Tensor expected = torch::randn({4});
  torch::manual_seed(5);
  c10::Allocator* const allocators[] = {c10::GetAllocator(c10::kCPU), c10::GetAllocator(c10::kMeta)};
  nn::Linear existing(4, 3);
  torch::manual_seed(5);
  const Tensor weight = existing->weight.detach().clone();
  const auto random_step = [&] {
    auto twin = std::dynamic_pointer_cast<nn::LinearImpl>(existing->clone());
    twin->forward(torch::randn({2, 4})).sum().backward();
  };
  plan(random_step, cpu());
  CHECK_THROWS_AS(plan(
                      [&] {
                        random_step();
                        throw std::runtime_error("from the step");
                      },
                      cpu()),
                  std::runtime_error);
  CHECK(allocators[0] == c10::GetAllocator(c10::kCPU));
  CHECK(allocators[1] == c10::GetAllocator(c10::kMeta));
  CHECK_FALSE(DryRun::device().has_value());
  CHECK(TraceRecorder::current() == nullptr);
  CHECK(torch::randn({4}).equal(expected));
  CHECK(existing->weight.equal(weight));
  CHECK_FALSE(existing->weight.grad().defined());
  CHECK_FALSE(
      c10::Dispatcher::singleton().findSchema({"aten::relu", ""})->hasKernelForDispatchKey(c10::DispatchKey::Meta));
}

TEST_CASE("a plan within a measured trace sees its own operators once, and the trace goes on") {
  double within = 0;
  const auto step = [] { torch::mm(torch::randn({30, 20}), torch::randn({20, 10})); };
  const Plan alone = plan(step, cpu());
  const Plan outer = measure_trace([&] {
    step();
    within = plan(step, cpu()).flops;
    step();
  });
  CHECK(alone.flops == 2 * 30 * 20 * 10);
  CHECK(within == alone.flops);
  CHECK(outer.flops == 2 * alone.flops);
  CHECK(outer.peak_bytes >= alone.peak_bytes);
}

TEST_CASE("threads plan at once, and while another one computes: each sees its own step") {
  const auto step_of = [](int64_t size) {
    return [size] {
      nn::Encoder encoder(nn::EncoderOptions(32, 2, {64}, 1).gradient_checkpointing("full"));
      encoder->forward(torch::randn({2, size, 32}).requires_grad_()).sum().backward();
      const HostTensors host;
      torch::ones({size * 1000});
    };
  };
  const std::vector<int64_t> sizes{50, 60, 70, 80};
  std::vector<int64_t> alone;
  for (const int64_t size : sizes) alone.push_back(plan(step_of(size), cpu()).peak_bytes);
  std::vector<std::set<int64_t>> seen(sizes.size());
  torch::manual_seed(5);
  std::atomic<bool> planning = true;
  std::vector<Tensor> drawn;
  std::thread computes([&] {
    while (planning || drawn.size() < 2000) {
      Tensor x = torch::ones({100'000});
      for (int i = 0; i < 5; ++i) x = x + x;
      if (drawn.size() < 2000) drawn.push_back(torch::randn({}));
    }
  });
  std::vector<std::thread> threads;
  for (size_t i = 0; i < sizes.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 10; ++repeat) seen[i].insert(plan(step_of(sizes[i]), cpu()).peak_bytes);
    });
  }
  for (std::thread& thread : threads) thread.join();
  planning = false;
  computes.join();
  for (size_t i = 0; i < sizes.size(); ++i) CHECK(seen[i] == std::set<int64_t>{alone[i]});
  torch::manual_seed(5);
  for (const Tensor& x : drawn) REQUIRE(x.equal(torch::randn({})));  // no plan rewound the generator
}

TEST_CASE("steps that cannot be planned say why") {
  const auto id_of = [](auto&& step) { return testing::error_of([&] { plan(step, cpu()); }).id(); };
  CHECK(id_of([] { torch::randn({3}).sum().item<float>(); }) == "headroom.memory.plan.values");
  CHECK(id_of([] { torch::randn({3}).data_ptr<float>()[0] = 1; }) == "headroom.memory.plan.values");
  const Error missing = testing::error_of([&] { plan([] { torch::bincount(torch::arange(3)); }, cpu()); });
  CHECK(missing.id() == "headroom.memory.plan.operator");
  CHECK(testing::contains(missing.what(), "aten::bincount"));
  CHECK(testing::contains(missing.what(), "m.impl(\"bincount\""));
  const auto model = [] {
    torch::nn::Linear linear(100, 100);
    name_modules(*linear);
  };
  CHECK(testing::error_of([&] { plan(model, cpu(), {.budget = 1000}); }).id() == "headroom.memory.plan.budget");
  CHECK(testing::error_of([&] { plan(model, cpu(), {.budget = 0}); }).id() == "headroom.memory.plan.budget");
  CHECK(plan([] { torch::randn({3}).sum().item<float>(); }, cpu(), {.value = 2}).values_read == 1);
}

TEST_CASE("an operator that is registered by hand can be planned") {
  torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::Meta, __FILE__, __LINE__);
  library.impl("bincount",
               [](const Tensor& x, const std::optional<Tensor>&, int64_t) { return at::empty({1000}, x.options()); });
  const Plan planned = plan([] { torch::bincount(torch::zeros({5}, torch::kLong)); }, cpu());
  CHECK(planned.largest_block()->bytes == 8000);
}

TEST_CASE("the allocator model rounds, pools, splits, merges and caches as CUDA's") {
  constexpr int64_t kMiB = 1 << 20;
  SECTION("small blocks share segments of 2 MiB, rounded up to 512 bytes") {
    CachingAllocatorModel model(1 << 30);
    REQUIRE(model.allocate(1, 1));
    CHECK(model.allocated() == 512);
    CHECK(model.reserved() == 2 * kMiB);
    REQUIRE(model.allocate(2, 513));
    CHECK(model.allocated() == 512 + 1024);
    CHECK(model.reserved() == 2 * kMiB);
    REQUIRE(model.allocate(3, kMiB));
    CHECK(model.reserved() == 2 * kMiB);
    REQUIRE(model.allocate(4, kMiB));  // no room behind the three
    CHECK(model.reserved() == 4 * kMiB);
  }
  SECTION("large blocks: segments of 20 MiB below 10 MiB, of a multiple of 2 MiB above") {
    CachingAllocatorModel model(1 << 30);
    REQUIRE(model.allocate(1, kMiB + 1));
    CHECK(model.reserved() == 20 * kMiB);
    REQUIRE(model.allocate(2, 9 * kMiB));
    CHECK(model.reserved() == 20 * kMiB);
    REQUIRE(model.allocate(3, 10 * kMiB));
    CHECK(model.reserved() == 30 * kMiB);
    REQUIRE(model.allocate(4, 11 * kMiB));
    CHECK(model.reserved() == 42 * kMiB);
  }
  SECTION("a large block keeps a rest of at most 1 MiB") {
    CachingAllocatorModel model(1 << 30);
    REQUIRE(model.allocate(1, 11 * kMiB));
    CHECK(model.allocated() == 12 * kMiB);
    CHECK(model.largest_free() == 0);
  }
  SECTION("released memory stays reserved, is used again and merges with its neighbours") {
    CachingAllocatorModel model(1 << 30);
    for (int id = 0; id < 4; ++id) REQUIRE(model.allocate(id, 5 * kMiB));
    CHECK(model.reserved() == 20 * kMiB);
    model.release(1);
    model.release(2);
    CHECK(model.largest_free() == 10 * kMiB);
    CHECK(model.allocated() == 10 * kMiB);
    REQUIRE(model.allocate(5, 9 * kMiB));
    CHECK(model.reserved() == 20 * kMiB);
    CHECK(model.peak_reserved() == 20 * kMiB);
  }
  SECTION("the smallest block that fits") {
    CachingAllocatorModel model(1 << 30);
    REQUIRE(model.allocate(1, 40 * kMiB));
    REQUIRE(model.allocate(2, 20 * kMiB));
    model.release(1);
    model.release(2);
    REQUIRE(model.allocate(3, 20 * kMiB));
    CHECK(model.largest_free() == 40 * kMiB);
  }
  SECTION("a full device gets free segments back before it fails") {
    CachingAllocatorModel model(100 * kMiB);
    REQUIRE(model.allocate(1, 40 * kMiB));
    REQUIRE(model.allocate(2, 40 * kMiB));
    model.release(1);
    model.release(2);
    REQUIRE(model.allocate(3, 80 * kMiB));
    CHECK(model.reserved() == 80 * kMiB);
    CHECK_FALSE(model.allocate(4, 30 * kMiB));
    CHECK(model.allocated() == 80 * kMiB);
  }
  SECTION("fragmentation: free segments next to each other do not add up, expandable ones do") {
    for (const bool expandable : {false, true}) {
      CachingAllocatorModel model(100 * kMiB, {.expandable_segments = expandable});
      REQUIRE(model.allocate(1, 40 * kMiB));
      REQUIRE(model.allocate(2, 40 * kMiB));
      REQUIRE(model.allocate(3, 2 * kMiB));
      model.release(1);
      model.release(2);
      CHECK(model.reserved() == (expandable ? 100 : 100) * kMiB);
      CHECK(model.largest_free() == (expandable ? 80 : 40) * kMiB);
    }
  }
  CHECK(testing::error_of([] { CachingAllocatorModel(1).release(3); }).id() == "headroom.memory.allocator_model");
}

TEST_CASE("device profiles") {
  for (const DeviceProfile& profile : known_devices()) {
    CAPTURE(profile.name);
    CHECK(device_profile(profile.name).total_bytes == profile.total_bytes);
    CHECK(profile.usable_bytes() > profile.total_bytes / 10 * 9);
    CHECK_FALSE(profile.total_bytes_source.empty());
    CHECK_FALSE(profile.context_bytes_source.empty());
    CHECK_FALSE(profile.workspace_bytes_source.empty());
  }
  CHECK(testing::error_of([] { device_profile("rtx"); }).id() == "headroom.memory.device_name");
  CHECK(this_machine().device().is_cpu());
}

TEST_CASE("reports") {
  const Plan planned = plan(
      [] {
        torch::nn::Linear linear(30, 20);
        name_modules(*linear, "a \"quoted\" <module>");
        linear->forward(torch::randn({50, 30})).sum().backward();
      },
      device_profile("rtx-4060-8gb"));
  CHECK(planned.fits);
  CHECK(explain(planned).empty());
  CHECK(planned.reserved_bytes % (2 << 20) == 0);
  CHECK(testing::contains(plan_json(planned), "\"peak_bytes\": " + std::to_string(planned.peak_bytes)));
  CHECK(testing::contains(plan_json(planned), R"(a \"quoted\" <module>)"));
  CHECK(testing::contains(plan_html(planned), "a &quot;quoted&quot; &lt;module&gt;"));
  std::ostringstream trace;
  write_plan_trace(trace, planned);
  CHECK(testing::contains(trace.str(), "\"name\": \"aten::addmm\""));
  std::ostringstream table;
  print_plan(table, planned);
  CHECK(testing::contains(table.str(), "fits: peak " + format_bytes(planned.peak_bytes)));
}

TEST_CASE("a plan names the operators whose memory it estimates") {
  const auto recurrent = [] {
    torch::nn::LSTM net(torch::nn::LSTMOptions(8, 8).proj_size(4));
    std::get<0>(net->forward(torch::ones({5, 2, 8}))).sum().backward();
  };
  const Plan on_cpu = plan(recurrent, this_machine());
  CHECK(on_cpu.estimated == std::vector<std::string>{"aten::lstm"});
  CHECK(testing::contains(plan_json(on_cpu), "\"estimated\": [\"aten::lstm\"],"));
  std::ostringstream table;
  print_plan(table, on_cpu);
  CHECK(testing::contains(table.str(), "an estimate: the CPU's library chooses what it needs in aten::lstm\n"));
  CHECK(plan(recurrent, device_profile("h100-80gb")).estimated.empty());
  const auto exact = [] { torch::nn::Linear(8, 8)->forward(torch::ones({5, 8})).sum().backward(); };
  CHECK(plan(exact, this_machine()).estimated.empty());
}

TEST_CASE("blocks that go at once go in the order in which they came") {
  TraceRecorder recorder;
  std::vector<Tensor> tensors;
  for (int64_t i = 1; i <= 5; ++i) tensors.push_back(torch::empty({i}, torch::kByte));
  tensors[3].reset();
  const Tensor between = torch::empty({9}, torch::kByte);
  for (const size_t i : {4, 0, 2}) tensors[i].reset();
  {
    const Phase phase("other");
    tensors[1].reset();
  }
  const MemoryTrace trace = recorder.finish();
  std::vector<std::pair<int64_t, int64_t>> ends;  // time, bytes
  for (const auto& block : trace.blocks) ends.emplace_back(block.end, block.bytes);
  std::ranges::sort(ends);
  std::vector<int64_t> order;
  for (const auto& [time, bytes] : ends) order.push_back(bytes);
  CHECK(order == std::vector<int64_t>{4, 1, 3, 5, 2, 9});
}
