#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/memory/meter.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan/plan.hpp"
#include "support/catch.hpp"
#include "support/operators.hpp"

using namespace headroom;
using headroom::detail::AutocastGuard;
using testing::OperatorCase;
using testing::Seen;
using testing::Tensors;
using torch::Tensor;

namespace {

Tensor narrow(const Tensor& x) { return x.to(torch::kBFloat16); }

/// One of each kind: what autocast narrows, widens and makes alike, and what it leaves alone.
std::vector<OperatorCase> autocast_cases() {
  using T = const Tensors&;
  return {
      {"linear", {{6, 40, 50}, {30, 50}, {30}}, [](T x) { return torch::linear(x[0], x[1], x[2]); }},
      {"linear without bias", {{40, 50}, {30, 50}}, [](T x) { return torch::linear(x[0], x[1]); }},
      {"one weight twice", {{40, 50}, {50, 50}}, [](T x) { return torch::linear(torch::linear(x[0], x[1]), x[1]); }},
      {"matmul", {{6, 40, 50}, {6, 50, 30}}, [](T x) { return torch::matmul(x[0], x[1]); }},
      {"mm", {{40, 50}, {50, 30}}, [](T x) { return torch::mm(x[0], x[1]); }},
      {"mm, small", {{3, 5}, {5, 4}}, [](T x) { return torch::mm(x[0], x[1]); }},
      {"mm of narrow factors", {{40, 50}, {50, 30}}, [](T x) { return torch::mm(narrow(x[0]), narrow(x[1])); }},
      {"bmm", {{6, 40, 50}, {6, 50, 30}}, [](T x) { return torch::bmm(x[0], x[1]); }},
      {"bmm, transposed", {{6, 40, 50}, {6, 30, 50}}, [](T x) { return torch::bmm(x[0], x[1].transpose(1, 2)); }},
      {"addmm", {{30}, {40, 50}, {50, 30}}, [](T x) { return torch::addmm(x[0], x[1], x[2]); }},
      {"baddbmm", {{6, 40, 30}, {6, 40, 50}, {6, 50, 30}}, [](T x) { return torch::baddbmm(x[0], x[1], x[2]); }},
      {"einsum",
       {{6, 40, 50}, {50, 30}},
       [](T x) {
         return torch::einsum("bij,jk->bik", {x[0], x[1]});
       }},
      {"vecdot", {{40, 50}, {40, 50}}, [](T x) { return torch::linalg_vecdot(x[0], x[1]); }},
      {"prelu", {{40, 50}, {1}}, [](T x) { return torch::prelu(x[0], x[1]); }},
      {"mse loss", {{40, 50}, {40, 50}}, [](T x) { return torch::mse_loss(narrow(x[0]), x[1]); }},
      {"l1 loss", {{40, 50}, {40, 50}}, [](T x) { return torch::l1_loss(narrow(x[0]), narrow(x[1])); }},
      {"smooth l1 loss", {{40, 50}, {40, 50}}, [](T x) { return torch::smooth_l1_loss(narrow(x[0]), narrow(x[1])); }},
      {"huber loss", {{40, 50}, {40, 50}}, [](T x) { return torch::huber_loss(narrow(x[0]), narrow(x[1])); }},
      {"kl div", {{40, 50}, {40, 50}}, [](T x) { return torch::kl_div(narrow(x[0]), narrow(x[1])); }},
      {"cross entropy",
       {{40, 50}},
       [](T x) { return torch::cross_entropy_loss(narrow(x[0]), torch::zeros({40}, torch::kLong)); }},
      {"binary cross entropy with logits",
       {{40, 50}},
       [](T x) {
         return torch::binary_cross_entropy_with_logits(narrow(x[0]), torch::zeros({40, 50}));
       }},
      {"cdist", {{40, 50}, {30, 50}}, [](T x) { return torch::cdist(narrow(x[0]), narrow(x[1])); }},
      {"view_as_complex", {{40, 2}}, [](T x) { return torch::view_as_real(torch::view_as_complex(narrow(x[0]))); }},
      {"polar", {{40, 50}, {40, 50}}, [](T x) { return torch::view_as_real(torch::polar(x[0], x[1])); }},
      {"fft_rfft", {{40, 50}}, [](T x) { return torch::view_as_real(torch::fft_rfft(narrow(x[0]))); }},
      {"stft",
       {{2, 600}},
       [](T x) {
         return torch::view_as_real(
             torch::stft(narrow(x[0]), 64, 16, 64, torch::hann_window(64), true, "reflect", false, true, true));
       }},
      {"reflection_pad1d",
       {{4, 50}},
       [](T x) {
         return torch::reflection_pad1d(narrow(x[0]), {5, 6});
       }},
      {"reflection_pad2d",
       {{4, 20, 30}},
       [](T x) {
         return torch::reflection_pad2d(narrow(x[0]), {5, 6, 7, 8});
       }},
      {"replication_pad1d",
       {{4, 50}},
       [](T x) {
         return torch::replication_pad1d(narrow(x[0]), {5, 6});
       }},
      {"avg_pool3d", {{2, 3, 8, 8, 8}}, [](T x) { return torch::avg_pool3d(narrow(x[0]), 2); }},
      {"cat",
       {{40, 50}, {40, 50}},
       [](T x) {
         return torch::cat({narrow(x[0]), x[1]}, 1);
       }},
      {"cat of narrow tensors",
       {{40, 50}, {40, 50}},
       [](T x) {
         return torch::cat({narrow(x[0]), narrow(x[1])});
       }},
      {"stack",
       {{40, 50}, {40, 50}},
       [](T x) {
         return torch::stack({narrow(x[0]), x[1]});
       }},
      {"index_copy",
       {{40, 50}, {40, 3}},
       [](T x) { return torch::index_copy(narrow(x[0]), 1, torch::arange(3), x[1]); }},
      {"layer norm", {{40, 50}, {50}, {50}}, [](T x) { return torch::layer_norm(narrow(x[0]), {50}, x[1], x[2]); }},
      {"group norm", {{4, 12, 30}, {12}, {12}}, [](T x) { return torch::group_norm(narrow(x[0]), 3, x[1], x[2]); }},
      {"softmax", {{40, 50}}, [](T x) { return torch::softmax(narrow(x[0]), 1); }},
      {"gelu", {{40, 50}}, [](T x) { return torch::gelu(narrow(x[0])); }},
      {"dropout", {{40, 50}}, [](T x) { return torch::dropout(narrow(x[0]), 0.3, true); }},
      {"sum of types", {{40, 50}, {40, 50}}, [](T x) { return narrow(x[0]) + x[1]; }},
      {"mean", {{40, 50}}, [](T x) { return narrow(x[0]).mean(1); }},
      {"cumsum", {{40, 50}}, [](T x) { return narrow(x[0]).cumsum(1); }},
  };
}

OperatorCase under_autocast(OperatorCase c, c10::DeviceType device) {
  c.run = [run = c.run, device](const Tensors& x) {
    const AutocastGuard autocast(device, torch::kBFloat16);
    return run(x);
  };
  return c;
}

/// dtype of what an operator makes of a tensor of bfloat16 under autocast, planned for a device.
torch::ScalarType planned_type(const std::string& device, const std::function<Tensor(const Tensor&)>& run) {
  torch::ScalarType type{};
  plan(
      [&] {
        const AutocastGuard autocast(device_profile(device).device().type(), torch::kBFloat16);
        type = run(torch::rand({4, 6, 8}, torch::kBFloat16)).scalar_type();
      },
      device_profile(device));
  return type;
}

/// Bytes of a step's blocks and how many of each.
std::map<int64_t, int64_t> blocks_of(const Plan& plan) {
  std::map<int64_t, int64_t> count;
  for (const auto& block : plan.trace.blocks) ++count[block.bytes];
  return count;
}

}  // namespace

TEST_CASE("under autocast operators without data give the dtypes, shapes and bytes of those with data") {
  for (const OperatorCase& original : autocast_cases()) {
    CAPTURE(original.name);
    const OperatorCase c = under_autocast(original, torch::kCPU);
    MemoryMeter host;
    const Seen real = testing::see(c, host);
    const Seen dry = testing::see_dry(c);
    CHECK(dry.tensors == real.tensors);
    CHECK(dry.peak <= real.peak);
    CHECK(dry.peak + 64 >= real.peak);  // numbers such as the 0.3 of dropout are CPU tensors, here as there
  }
}

TEST_CASE("a plan casts as autocast of the device that it stands for") {
  const auto check = [](const char* name, torch::ScalarType on_cpu, torch::ScalarType on_cuda, const auto& run) {
    CAPTURE(name);
    CHECK(planned_type("cpu", run) == on_cpu);
    CHECK(planned_type("rtx-4090-24gb", run) == on_cuda);
  };
  constexpr auto kNarrow = torch::kBFloat16, kWide = torch::kFloat;
  const auto wide = [](const Tensor& x) { return x.to(torch::kFloat); };
  check("linear", kNarrow, kNarrow, [&](const Tensor& x) { return torch::linear(wide(x), torch::rand({3, 8})); });
  check("softmax", kNarrow, kWide, [](const Tensor& x) { return torch::softmax(x, 1); });
  check("layer norm", kNarrow, kWide, [](const Tensor& x) { return torch::layer_norm(x, {8}); });
  check("exp", kNarrow, kWide, [](const Tensor& x) { return torch::exp(x); });
  check("sum", kNarrow, kWide, [](const Tensor& x) { return x.sum(); });
  check("norm", kNarrow, kWide, [](const Tensor& x) { return x.norm(); });
  check("power", kNarrow, kWide, [](const Tensor& x) { return x.pow(2); });
  check("padding", kWide, kNarrow, [](const Tensor& x) { return torch::reflection_pad1d(x, {2, 2}); });
  check("addcmul", kWide, kWide, [&](const Tensor& x) { return torch::addcmul(wide(x), x, x); });
  check("double", torch::kDouble, torch::kDouble,
        [](const Tensor& x) { return torch::mm(x[0].to(torch::kDouble), x[0].t().to(torch::kDouble)); });

  // What autocast refuses on one device only
  const auto loss = [](const Tensor& x) { return torch::binary_cross_entropy(x, torch::zeros_like(x)); };
  CHECK(planned_type("cpu", loss) == torch::kFloat);
  CHECK_THROWS_WITH(planned_type("rtx-4090-24gb", loss), Catch::Contains("are unsafe to autocast"));
  // Autocast of another device casts nothing
  plan(
      [] {
        const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
        CHECK(torch::linear(torch::rand({2, 3}), torch::rand({4, 3})).scalar_type() == torch::kFloat);
      },
      device_profile("rtx-4090-24gb"));
}

TEST_CASE("cast weights live as long in a plan as they do in autocast's cache") {
  const auto step_with = [](bool caches, bool nested, bool outside) {
    return [=] {
      const Tensor weight = torch::randn({64, 64}).requires_grad_(), x = torch::randn({1, 64});
      Tensor y;
      {
        const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
        const bool before = at::autocast::is_autocast_cache_enabled();
        at::autocast::set_autocast_cache_enabled(caches);
        y = torch::linear(torch::linear(x, weight), weight);
        if (nested) {
          const AutocastGuard inner(torch::kCPU, torch::kBFloat16);
          y = y + torch::linear(x, weight);
        }
        if (outside) {
          at::autocast::set_autocast_enabled(torch::kCPU, false);
          y = torch::linear(y.to(torch::kFloat), weight);
        }
        at::autocast::set_autocast_cache_enabled(before);
      }
      const AutocastGuard again(torch::kCPU, torch::kBFloat16);
      y = torch::linear(y, weight);
      torch::linear(x, weight.detach());
      const torch::NoGradGuard no_grad;
      torch::linear(x, weight);
      torch::randn({128, 64});  // the peak, with what is held until here
    };
  };
  for (const bool caches : {true, false}) {
    for (const bool nested : {true, false}) {
      for (const bool outside : {true, false}) {
        CAPTURE(caches, nested, outside);
        const auto step = step_with(caches, nested, outside);
        const Plan measured = measure_trace(step), planned = plan(step, this_machine());
        CHECK(planned.peak_bytes == measured.peak_bytes);
        CHECK(blocks_of(planned)[64 * 64 * 2] == blocks_of(measured)[64 * 64 * 2]);
      }
    }
  }
}

TEST_CASE("steps of modules under autocast are planned byte for byte, with and without recomputation") {
  torch::manual_seed(3);
  for (const char* policy : {"none", "full", "selective", "tiled"}) {
    CAPTURE(policy);
    const auto step = [&] {
      nn::EncoderOptions options(48, 3, {96}, 3);
      options.gradient_checkpointing(policy);
      nn::Encoder encoder(options);
      torch::nn::LayerNorm norm(torch::nn::LayerNormOptions({48}));
      Tensor y;
      {
        const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
        y = norm->forward(encoder->forward(torch::randn({3, 50, 48}).requires_grad_()));
      }
      y.to(torch::kFloat).square().mean().backward();
    };
    const int64_t measured = MemoryMeter().measure(step).added_peak();
    CHECK(plan(step, this_machine()).peak_bytes == measured);
  }
}

TEST_CASE("planning under autocast leaves autocast as it was, and other threads alone") {
  const auto all_off = [] {
    const auto& devices = at::autocast::_AUTOCAST_SUPPORTED_DEVICES;
    return std::none_of(devices.begin(), devices.end(), [](auto d) { return at::autocast::is_autocast_enabled(d); });
  };
  const Tensor weight = torch::randn({8, 8}).requires_grad_(), x = torch::randn({2, 8});
  const auto product_type = [&] {
    const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
    const Tensor y = torch::linear(x, weight);
    CHECK(y.is_cpu());
    return y.scalar_type();
  };
  CHECK(all_off());
  const auto step = [&] {
    const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
    CHECK(torch::linear(torch::randn({2, 8}), weight).is_meta());
    torch::ScalarType elsewhere{};
    std::thread([&] { elsewhere = product_type(); }).join();
    CHECK(elsewhere == torch::kBFloat16);
  };
  plan(step, this_machine());
  CHECK(all_off());
  CHECK(product_type() == torch::kBFloat16);
  CHECK(torch::linear(x, weight).scalar_type() == torch::kFloat);
  CHECK_THROWS_AS(plan(
                      [&] {
                        step();
                        throw std::runtime_error("from the step");
                      },
                      this_machine()),
                  std::runtime_error);
  CHECK(all_off());
  CHECK(product_type() == torch::kBFloat16);

  // Within autocast, too
  const AutocastGuard autocast(torch::kCPU, torch::kBFloat16);
  const Tensor before = torch::linear(x, weight);
  plan([&] { CHECK(torch::linear(torch::randn({2, 8}), weight).scalar_type() == torch::kBFloat16); }, this_machine());
  CHECK(torch::linear(x, weight).equal(before));
}
