#include "headroom/plan/meta_kernels.hpp"

#include <torch/torch.h>

#include "headroom/memory/meter.hpp"
#include "headroom/plan/plan.hpp"
#include "support/catch.hpp"
#include "support/operators.hpp"

using namespace headroom;
using testing::OperatorCase;
using testing::Seen;
using testing::Tensors;
using torch::Tensor;

namespace {

std::vector<OperatorCase> cases() {
  namespace F = torch::nn::functional;
  std::vector<OperatorCase> all;
  const auto add = [&](const std::string& name, std::vector<std::vector<int64_t>> shapes,
                       std::function<Tensor(const Tensors&)> run, torch::ScalarType dtype = torch::kFloat) {
    all.push_back({name, std::move(shapes), std::move(run), dtype});
  };
  using T = const Tensors&;
  add("relu", {{40, 50}}, [](T x) { return torch::relu(x[0]); });
  add("prelu", {{40, 50}, {50}}, [](T x) { return torch::prelu(x[0], x[1]); });
  add("hardtanh", {{40, 50}}, [](T x) { return torch::hardtanh(x[0]); });
  add("hardswish", {{40, 50}}, [](T x) { return torch::hardswish(x[0]); });
  add("log sigmoid", {{40, 50}}, [](T x) { return torch::log_sigmoid(x[0]); });
  add("glu", {{40, 50}}, [](T x) { return torch::glu(x[0]); });
  add("silu", {{40, 50}}, [](T x) { return torch::silu(x[0]); });
  add("abs", {{40, 50}}, [](T x) { return torch::abs(x[0]); });
  add(
      "abs of complex", {{40, 50}}, [](T x) { return torch::abs(x[0]); }, torch::kComplexFloat);
  add("complex", {{40, 50}, {40, 50}}, [](T x) { return torch::complex(x[0], x[1]).abs(); });
  add("where", {{40, 50}, {1, 50}}, [](T x) { return torch::where(x[0] > 0.5, x[0], x[1]); });
  add("real times complex", {{40, 50}}, [](T x) { return torch::view_as_real(torch::complex(x[0], x[0]) * x[0]); });
  add("layer norm", {{40, 50}, {50}, {50}}, [](T x) { return torch::layer_norm(x[0], {50}, x[1], x[2]); });
  add("layer norm of a transposed view", {{50, 40}, {50}, {50}},
      [](T x) { return torch::layer_norm(x[0].t(), {50}, x[1], x[2]); });
  add("group norm", {{4, 12, 30}, {12}, {12}}, [](T x) { return torch::group_norm(x[0], 3, x[1], x[2]); });
  add("batch norm", {{40, 12, 30}, {12}, {12}},
      [](T x) { return torch::batch_norm(x[0], x[1], x[2], {}, {}, true, 0.1, 1e-5, false); });
  add("instance norm", {{4, 12, 30}, {12}, {12}},
      [](T x) { return torch::instance_norm(x[0], x[1], x[2], {}, {}, true, 0.1, 1e-5, false); });
  add("variance", {{40, 50}}, [](T x) { return torch::var(x[0], 1); });
  add("standard deviation", {{40, 50}}, [](T x) { return torch::std(x[0], 0, true, true); });
  add("logsumexp", {{40, 50}}, [](T x) { return torch::logsumexp(x[0], 1); });
  add("cumulative sum", {{40, 50}}, [](T x) { return torch::cumsum(x[0], 1); });
  add("softmax", {{40, 50}}, [](T x) { return torch::softmax(x[0], 1); });
  add("index_select", {{40, 50}}, [](T x) { return torch::index_select(x[0], 1, torch::zeros({7}, torch::kLong)); });
  all.back().at_most = true;
  add("bucketize", {{40, 50}}, [](T x) { return torch::bucketize(x[0], torch::ones({5}), true); });
  add("embedding", {{40, 50}}, [](T x) { return torch::embedding(x[0], torch::zeros({3, 7}, torch::kLong)); });
  add("gather", {{40, 50}}, [](T x) { return torch::gather(x[0], 1, torch::zeros({40, 9}, torch::kLong)); });
  all.back().at_most = true;
  add("flip", {{40, 50}}, [](T x) { return torch::flip(x[0], {1}); });
  add("roll", {{40, 50}}, [](T x) { return torch::roll(x[0], {3}, {1}); });
  add("unfold", {{40, 50}}, [](T x) { return x[0].unfold(1, 8, 4); });
  add("reflection_pad1d", {{4, 50}}, [](T x) { return torch::reflection_pad1d(x[0], {5, 6}); });
  add("reflection_pad2d", {{4, 20, 30}}, [](T x) { return torch::reflection_pad2d(x[0], {5, 6, 7, 8}); });
  add("constant padding", {{4, 50}}, [](T x) { return torch::constant_pad_nd(x[0], {5, 6}); });
  add("im2col", {{2, 3, 20, 30}}, [](T x) { return torch::im2col(x[0], {3, 4}, {1, 1}, {0, 1}, {2, 2}); });
  add("col2im", {{2, 3 * 12, 9 * 15}}, [](T x) {
    return torch::col2im(x[0], {20, 30}, {3, 4}, {1, 1}, {0, 1}, {2, 2});
  });
  add("mse loss", {{40, 50}, {40, 50}}, [](T x) { return torch::mse_loss(x[0], x[1]); });
  add("l1 loss", {{40, 50}, {40, 50}}, [](T x) { return torch::l1_loss(x[0], x[1]); });
  add("smooth l1 loss", {{40, 50}, {40, 50}}, [](T x) { return torch::smooth_l1_loss(x[0], x[1]); });
  add("huber loss", {{40, 50}, {40, 50}}, [](T x) { return torch::huber_loss(x[0], x[1]); });
  add("binary cross entropy", {{40, 50}}, [](T x) {
    return torch::binary_cross_entropy(x[0], torch::zeros({40, 50}));
  });
  add("cross entropy", {{40, 50}},
      [](T x) { return torch::cross_entropy_loss(x[0], torch::zeros({40}, torch::kLong)); });
  add("dropout", {{40, 50}}, [](T x) { return torch::dropout(x[0], 0.3, true); });
  add("fft_rfft", {{40, 50}}, [](T x) { return torch::view_as_real(torch::fft_rfft(x[0])); });
  add("fft_rfft along the first dimension", {{40, 50}},
      [](T x) { return torch::view_as_real(torch::fft_rfft(x[0], {}, 0)); });
  add(
      "fft_irfft", {{40, 26}}, [](T x) { return torch::fft_irfft(x[0], 50); }, torch::kComplexFloat);
  add(
      "fft_fft", {{40, 50}}, [](T x) { return torch::fft_fft(x[0]); }, torch::kComplexFloat);
  add("fft_rfft2", {{6, 40, 50}}, [](T x) { return torch::view_as_real(torch::fft_rfft2(x[0])); });
  add("stft", {{2, 600}}, [](T x) {
    return torch::view_as_real(
        torch::stft(x[0], 64, 16, 64, torch::hann_window(64), true, "reflect", false, true, true));
  });
  return all;
}

}  // namespace

TEST_CASE(
    "operators without data have the shapes, dtypes, strides and bytes of those with data, forward and backward") {
  for (const OperatorCase& c : cases()) {
    CAPTURE(c.name);
    MemoryMeter host;
    const Seen real = see(c, host);
    const Seen dry = testing::see_dry(c);
    CHECK(dry.tensors == real.tensors);
    if (!c.at_most) CHECK(dry.peak <= real.peak);
    CHECK(dry.peak + 64 >= real.peak);  // numbers such as the 0.3 of dropout are CPU tensors, here as there
  }
}

TEST_CASE("the kernels are registered while they are wanted, and only where LibTorch has none") {
  const auto registered = [](const char* name) {
    return c10::Dispatcher::singleton()
        .findSchema({std::string("aten::") + name, ""})
        ->hasKernelForDispatchKey(c10::DispatchKey::Meta);
  };
  CHECK_FALSE(registered("relu"));
  {
    const MetaKernels outer;
    CHECK(registered("relu"));
    { const MetaKernels inner; }
    CHECK(registered("relu"));
    CHECK(torch::relu(torch::empty({2, 3}, torch::kMeta)).sizes() == at::IntArrayRef({2, 3}));
  }
  CHECK_FALSE(registered("relu"));
}

TEST_CASE("what networks of convolutions hold for backward is exact") {
  torch::manual_seed(1);
  const auto check = [](const auto& forward) {
    Tensor kept;
    MemoryMeter meter;
    const auto measured = meter.measure([&] { kept = forward(); });
    const int64_t real = measured.held();
    kept = Tensor();
    int64_t planned = 0;
    headroom::detail::dry_trace(
        [&] {
          const MemoryMeter dry(torch::kMeta);
          const int64_t before = dry.live();
          const Tensor y = forward();
          planned = dry.live() - before;
        },
        torch::kCPU);
    CHECK(planned == real);
    CHECK(planned > 0);
  };
  SECTION("1-d") {
    check([] {
      return torch::nn::Sequential(torch::nn::Conv1d(torch::nn::Conv1dOptions(2, 48, 8).stride(4)), torch::nn::ReLU(),
                                   torch::nn::Conv1d(torch::nn::Conv1dOptions(48, 96, 1)), torch::nn::ELU(),
                                   torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(96, 2, 8).stride(4)))
          ->forward(torch::randn({2, 2, 4400}));
    });
  }
  SECTION("2-d") {
    check([] {
      return torch::nn::Sequential(torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 30, 3).padding(1)),
                                   torch::nn::BatchNorm2d(30), torch::nn::ReLU(),
                                   torch::nn::Conv2d(torch::nn::Conv2dOptions(30, 48, 3).stride(2).padding(1)),
                                   torch::nn::MaxPool2d(2))
          ->forward(torch::randn({2, 2, 64, 64}));
    });
  }
}
