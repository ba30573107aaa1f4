#include "headroom/plan/kernels/probe.hpp"

#include <torch/torch.h>

#include "headroom/memory/meter.hpp"
#include "headroom/plan/plan.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

/// Bytes that a function allocates on top of what is live, and what its results look like.
struct Seen {
  int64_t peak = 0;
  std::vector<std::string> tensors;
};

using Forward = std::function<Tensor()>;

/// A forward pass alone, and its gradients alone, of the parameters that it makes.
template <class Layer>
std::vector<Seen> see(c10::Device device, const Layer& layer) {
  std::vector<Seen> seen(2);
  std::vector<Tensor> inputs;
  const Forward forward = layer(inputs);
  for (Tensor& input : inputs) input.requires_grad_();
  Tensor y;
  std::vector<Tensor> gradients;
  const MemoryMeter meter(device);
  seen[0].peak = meter.measure([&] { y = forward(); }).added_peak();
  const Tensor grad = torch::ones({1}).expand(y.sizes());
  for (const Tensor& direction : {grad, torch::ones_like(y)}) {
    gradients.clear();
    const int64_t peak =
        meter.measure([&] { gradients = torch::autograd::grad({y}, inputs, {direction}, true); }).added_peak();
    seen.push_back({peak, {}});
  }
  gradients.push_back(y);
  for (const Tensor& x : gradients) seen.back().tensors.push_back(c10::str(x.sizes(), x.strides(), x.scalar_type()));
  return seen;
}

/// Checks a layer against itself without data: the same tensors, and peaks that are off by at most `tolerance`.
template <class Layer>
void check(const Layer& layer, double tolerance = 0) {
  const std::vector<Seen> real = see(torch::kCPU, layer);
  std::vector<Seen> dry;
  headroom::detail::dry_trace([&] { dry = see(torch::kMeta, layer); }, torch::kCPU);
  for (size_t i = 0; i < real.size(); ++i) {
    CAPTURE(i);
    CHECK(std::abs(static_cast<double>(dry[i].peak - real[i].peak)) <= tolerance * static_cast<double>(real[i].peak));
    CHECK(dry[i].tensors == real[i].tensors);
  }
}

struct Convolution {
  std::string name;
  std::vector<int64_t> input, weight;
  std::vector<int64_t> stride, padding, dilation;
  bool transposed = false;
  int64_t groups = 1;
  bool bias = true;
};

auto layer_of(const Convolution& c, torch::ScalarType dtype, const std::function<Tensor(Tensor)>& arrange) {
  return [=](std::vector<Tensor>& inputs) -> Forward {
    inputs = {arrange(torch::rand(c.input, dtype)), torch::rand(c.weight, dtype)};
    if (c.bias) inputs.push_back(torch::rand({c.transposed ? c.weight[1] * c.groups : c.weight[0]}, dtype));
    const std::vector<int64_t> no_padding(c.stride.size(), 0);
    return [=] {
      return torch::convolution(inputs[0], inputs[1], c.bias ? inputs[2] : Tensor(), c.stride, c.padding, c.dilation,
                                c.transposed, no_padding, c.groups);
    };
  };
}

Tensor as_it_is(Tensor x) { return x; }

template <class Net>
void check_network(const std::function<Net()>& make, const std::vector<int64_t>& shape) {
  const auto step = [&] {
    Net net = make();
    torch::optim::AdamW optimizer(net->parameters());
    for (int i = 0; i < 2; ++i) {
      optimizer.zero_grad();
      net->forward(torch::rand(shape)).square().mean().backward();
      optimizer.step();
    }
  };
  const int64_t measured = MemoryMeter().measure(step).added_peak();
  const Plan planned = plan(step, this_machine());
  CHECK(static_cast<double>(planned.peak_bytes) == Approx(static_cast<double>(measured)).epsilon(0.005));
}

/// As Demucs is built: strided convolutions, gated ones of width 1, and back with the same sizes added.
struct WaveNetworkImpl : torch::nn::Module {
  WaveNetworkImpl() {
    for (int64_t in = 2, out = 48; out <= 384; in = out, out *= 2) {
      encoder->push_back(torch::nn::Sequential(
          torch::nn::Conv1d(torch::nn::Conv1dOptions(in, out, 8).stride(4)), torch::nn::ReLU(),
          torch::nn::Conv1d(torch::nn::Conv1dOptions(out, 2 * out, 1)), torch::nn::GLU(torch::nn::GLUOptions(1))));
      decoder->push_back(torch::nn::Sequential(
          torch::nn::Conv1d(torch::nn::Conv1dOptions(out, 2 * out, 3).padding(1)),
          torch::nn::GLU(torch::nn::GLUOptions(1)),
          torch::nn::ConvTranspose1d(torch::nn::ConvTranspose1dOptions(out, in == 2 ? 8 : in, 8).stride(4))));
    }
    register_module("encoder", encoder);
    register_module("decoder", decoder);
  }
  Tensor forward(Tensor x) {
    std::vector<Tensor> sizes;
    for (const auto& block : *encoder) sizes.push_back(x = block->as<torch::nn::Sequential>()->forward(x));
    for (size_t i = decoder->size(); i-- > 0;) {
      const Tensor& skip = sizes[i];
      x = decoder[i]->as<torch::nn::Sequential>()->forward(torch::constant_pad_nd(x, {0, skip.size(2) - x.size(2)}) +
                                                           skip);
    }
    return x;
  }
  torch::nn::ModuleList encoder, decoder;
};
TORCH_MODULE(WaveNetwork);

struct UNetImpl : torch::nn::Module {
  UNetImpl() {
    down = register_module("down", block(2, 24));
    bottom = register_module("bottom", block(24, 48));
    widen =
        register_module("widen", torch::nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(48, 24, 2).stride(2)));
    up = register_module("up", block(48, 24));
    mask = register_module("mask", torch::nn::Conv2d(torch::nn::Conv2dOptions(24, 2, 1)));
  }
  static torch::nn::Sequential block(int64_t in, int64_t out) {
    const auto convolution = [](int64_t from, int64_t to) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(from, to, 3).padding(1).bias(false));
    };
    return torch::nn::Sequential(convolution(in, out), torch::nn::BatchNorm2d(out), torch::nn::ReLU(),
                                 convolution(out, out), torch::nn::BatchNorm2d(out), torch::nn::ReLU());
  }
  Tensor forward(const Tensor& x) {
    const Tensor a = down->forward(x);
    const Tensor b = widen->forward(bottom->forward(torch::max_pool2d(a, 2)));
    return torch::sigmoid(mask->forward(up->forward(torch::cat({a, b}, 1)))) * x;
  }
  torch::nn::Sequential down, bottom, up;
  torch::nn::ConvTranspose2d widen = nullptr;
  torch::nn::Conv2d mask = nullptr;
};
TORCH_MODULE(UNet);

/// As Open-Unmix is built: an LSTM of three layers in both directions between linear ones.
struct RecurrentNetworkImpl : torch::nn::Module {
  RecurrentNetworkImpl(int64_t bins, int64_t width) {
    in = register_module("in", torch::nn::Linear(torch::nn::LinearOptions(bins, width).bias(false)));
    lstm = register_module(
        "lstm",
        torch::nn::LSTM(torch::nn::LSTMOptions(width, width / 2).num_layers(3).bidirectional(true).dropout(0.4)));
    out = register_module("out", torch::nn::Linear(2 * width, bins));
  }
  Tensor forward(const Tensor& x) {
    const Tensor y = torch::tanh(in->forward(x));
    return torch::relu(out->forward(torch::cat({y, std::get<0>(lstm->forward(y))}, -1))) * x;
  }
  torch::nn::Linear in = nullptr, out = nullptr;
  torch::nn::LSTM lstm = nullptr;
};
TORCH_MODULE(RecurrentNetwork);

}  // namespace

TEST_CASE("convolutions that are small are planned byte for byte, forward and backward") {
  const std::vector<Convolution> all = {
      {"1-d, strided", {2, 2, 800}, {48, 2, 8}, {4}, {0}, {1}},
      {"1-d, odd channels", {2, 5, 300}, {19, 5, 3}, {1}, {1}, {1}},
      {"1-d, dilated", {3, 16, 200}, {16, 16, 3}, {1}, {4}, {4}},
      {"1-d, by channel", {2, 32, 300}, {32, 1, 5}, {1}, {2}, {1}, false, 32},
      {"1-d, transposed", {2, 24, 60}, {24, 12, 8}, {4}, {0}, {1}, true},
      {"1-d, no bias", {2, 16, 300}, {32, 16, 3}, {1}, {1}, {1}, false, 1, false},
      {"1-d, one sample", {1, 16, 300}, {32, 16, 3}, {1}, {1}, {1}},
      {"2-d", {2, 3, 20, 30}, {16, 3, 3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"2-d, groups", {2, 32, 16, 16}, {32, 8, 3, 3}, {1, 1}, {1, 1}, {1, 1}, false, 4},
      {"2-d, one column", {2, 4, 128, 10}, {8, 4, 8, 1}, {4, 1}, {2, 0}, {1, 1}},
      {"2-d, transposed", {2, 16, 10, 10}, {16, 8, 2, 2}, {2, 2}, {0, 0}, {1, 1}, true},
      {"3-d", {2, 4, 6, 8, 8}, {8, 4, 3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}},
  };
  for (const Convolution& c : all) {
    CAPTURE(c.name);
    check(layer_of(c, torch::kFloat, as_it_is));
    check(layer_of(c, torch::kDouble, as_it_is));
    check(layer_of(c, torch::kFloat, [](Tensor x) { return x.transpose(1, -1).contiguous().transpose(1, -1); }));
    if (c.input.size() == 4) {
      check(layer_of(c, torch::kFloat, [](Tensor x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }));
    }
  }
}

TEST_CASE("convolutions that are not run as they are for a plan are planned within half a percent") {
  const std::vector<Convolution> all = {
      {"1-d, strided", {4, 48, 11024}, {96, 48, 8}, {4}, {0}, {1}},
      {"1-d, strided, one sample", {1, 2, 44100}, {48, 2, 8}, {4}, {0}, {1}},
      {"1-d, width 1", {4, 96, 2756}, {192, 96, 1}, {1}, {0}, {1}},
      {"1-d, transposed", {4, 96, 2755}, {96, 48, 8}, {4}, {0}, {1}, true},
      {"1-d, a part of the batch", {6, 48, 40000}, {48, 48, 3}, {1}, {1}, {1}},
      {"2-d", {4, 30, 64, 64}, {50, 30, 3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"2-d, no bias", {4, 32, 64, 64}, {64, 32, 3, 3}, {2, 2}, {1, 1}, {1, 1}, false, 1, false},
      {"2-d, many channels", {2, 256, 16, 16}, {256, 256, 3, 3}, {1, 1}, {1, 1}, {1, 1}},
  };
  for (const Convolution& c : all) {
    CAPTURE(c.name);
    check(layer_of(c, torch::kFloat, as_it_is), 0.005);
  }
  check(layer_of(all[0], torch::kDouble, as_it_is), 0.005);
}

TEST_CASE("LSTMs are planned byte for byte") {
  for (const bool bidirectional : {false, true}) {
    for (const bool batch_first : {false, true}) {
      for (const bool bias : {true, false}) {
        for (const int64_t layers : {1, 2}) {
          CAPTURE(bidirectional, batch_first, bias, layers);
          const auto layer = [=](std::vector<Tensor>& inputs) -> Forward {
            torch::nn::LSTM net(torch::nn::LSTMOptions(20, 24)
                                    .num_layers(layers)
                                    .bidirectional(bidirectional)
                                    .batch_first(batch_first)
                                    .bias(bias));
            inputs = net->parameters();
            inputs.push_back(torch::rand({30, 7, 20}));
            return [=]() mutable { return std::get<0>(net->forward(inputs.back())); };
          };
          check(layer);
          const auto without_gradients = [=] {
            const torch::NoGradGuard guard;
            std::vector<Tensor> inputs;
            layer(inputs)();
          };
          const int64_t measured = MemoryMeter().measure(without_gradients).added_peak();
          CHECK(plan(without_gradients, this_machine()).peak_bytes == measured);
        }
      }
    }
  }
}

TEST_CASE("networks of convolutions and LSTMs are planned within half a percent") {
  torch::manual_seed(1);
  SECTION("of the waveform") {
    check_network<WaveNetwork>([] { return WaveNetwork(); }, {2, 2, 16384});
  }
  SECTION("of the spectrogram") {
    check_network<UNet>([] { return UNet(); }, {2, 2, 64, 64});
  }
  SECTION("recurrent") {
    check_network<RecurrentNetwork>([] { return RecurrentNetwork(257, 64); }, {50, 4, 257});
  }
}

TEST_CASE("nobody sees what a plan runs") {
  const auto step = [] {
    torch::nn::Conv1d net(torch::nn::Conv1dOptions(3, 21, 5));
    net->forward(torch::rand({2, 3, 77})).sum().backward();
  };
  const auto nothing = [] { torch::rand({2, 3}); };
  const MemoryMeter meter;
  const auto allocations_of = [&](const auto& planned) {
    const int64_t before = meter.allocations();
    const Plan found = plan(planned, this_machine());
    CHECK(std::none_of(found.trace.blocks.begin(), found.trace.blocks.end(),
                       [](const auto& block) { return block.on_host; }));
    return meter.allocations() - before;
  };
  CHECK(allocations_of(step) == allocations_of(nothing));
  const Plan first = plan(step, this_machine()), again = plan(step, this_machine());
  CHECK(first.peak_bytes == again.peak_bytes);
  CHECK(first.trace.blocks.size() == again.trace.blocks.size());
  CHECK(first.trace.operators.size() == again.trace.operators.size());
}

TEST_CASE("a script is replayed in the order in which it was recorded") {
  headroom::detail::AllocationScript script;
  {
    headroom::detail::KernelProbe probe;
    script = probe.record([] {
      const Tensor a = torch::empty({10}, torch::kFloat);
      const Tensor b = torch::empty({5}, torch::kFloat);
      return std::vector{b};
    });
    const auto stopped = probe.record(
        [] {
          std::vector<Tensor> many;
          for (int64_t i = 1;; ++i) many.push_back(torch::empty({i}, torch::kByte));
          return many;
        },
        [](size_t i, int64_t) { return i == 2; });
    CHECK(stopped.bytes == std::vector<int64_t>{1, 2, 3});
    CHECK(stopped.results.empty());
  }
  CHECK(script.bytes == std::vector<int64_t>{40, 20});
  CHECK(script.before_release() == 2);
  script.insert_around(1, 100);
  const MemoryMeter meter(torch::kMeta);
  Tensor result;
  const MemoryReport report = meter.measure([&] {
    result = script.replay([](size_t, at::MemoryFormat) {
      return torch::empty({5}, torch::TensorOptions(torch::kFloat).device(torch::kMeta));
    })[0];
  });
  CHECK(report.added_peak() == 160);
  CHECK(report.held() == 20);
  CHECK(report.allocations == 3);
}
