#include "headroom/checkpoint.hpp"

#include <functional>
#include <string>
#include <vector>

#include "gpu/device.hpp"
#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "headroom/runtime/autocast_state.hpp"

using namespace headroom;
using namespace headroom::testing;
using torch::Tensor;

namespace {

nn::EncoderOptions encoder_options(const std::string& policy) {
  nn::EncoderOptions options(64, 4, {160}, 6);
  if (policy == "reversible") return options.reversible(true);
  return options.gradient_checkpointing(policy);
}

struct Gradients {
  std::vector<Tensor> all;  // of the input, then of the parameters
  Tensor output;
};

Gradients encoder_gradients(const std::string& policy, int64_t batch = 3, int64_t length = 130,
                            torch::ScalarType dtype = torch::kFloat) {
  torch::manual_seed(31);
  nn::Encoder encoder(encoder_options(policy));
  encoder->to(test_device(), dtype);
  const Tensor x = torch::randn({batch, length, 64}, torch::kDouble).to(test_device(), dtype).requires_grad_();
  Gradients result;
  result.output = encoder->forward(x);
  result.output.square().sum().backward();
  result.all.push_back(x.grad());
  for (const Tensor& p : encoder->parameters()) result.all.push_back(p.grad());
  return result;
}

double worst_difference(const Gradients& a, const Gradients& b) {
  double worst = 0;
  for (size_t i = 0; i < a.all.size(); ++i) {
    const Tensor difference = (a.all[i] - b.all[i]).abs().max() / b.all[i].abs().max();
    worst = std::max(worst, difference.item<double>());
  }
  return worst;
}

}  // namespace

TEST_CASE("checkpoint policies on the device give the gradients of none, bit for bit", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const Deterministic deterministic;
  const Gradients expected = encoder_gradients("none");
  REQUIRE(worst_difference(encoder_gradients("none"), expected) == 0);
  for (const char* policy :
       {"full", "selective", "every-2", "selective+every-2", "nested", "nested-3", "full+offload", "selective+offload",
        "nested+offload", "2*full,none", "2*full+offload,2*nested,selective"}) {
    CAPTURE(policy);
    const Gradients actual = encoder_gradients(policy);
    CHECK(actual.output.equal(expected.output));
    for (size_t i = 0; i < expected.all.size(); ++i) CHECK(actual.all[i].equal(expected.all[i]));
  }
}

TEST_CASE("tiled, rounded and reversible recomputation on the device", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const Gradients expected = encoder_gradients("none", 2, 700, torch::kDouble);
  for (const char* policy : {"tiled", "tiled+offload", "tiled+nested"}) {
    CAPTURE(policy);
    CHECK(worst_difference(encoder_gradients(policy, 2, 700, torch::kDouble), expected) < 1e-12);
    CHECK(worst_difference(encoder_gradients(policy, 2, 700), encoder_gradients("none", 2, 700)) < 2e-4);
  }
  CHECK(worst_difference(encoder_gradients("full+bf16", 2, 700), encoder_gradients("none", 2, 700)) < 0.05);
  // another model: its own gradients, in float against double
  const Gradients exact = encoder_gradients("reversible", 2, 700, torch::kDouble);
  Gradients ours = encoder_gradients("reversible", 2, 700);
  for (Tensor& x : ours.all) x = x.to(torch::kDouble);
  CHECK(worst_difference(ours, exact) < 1e-2);
}

TEST_CASE("a checkpoint on the device draws its random numbers again and replays autocast", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const Deterministic deterministic;
  torch::manual_seed(32);
  torch::nn::Linear up(32, 64), down(64, 32);
  torch::nn::Dropout drop(0.3);
  for (auto* const module : {up.ptr().get(), down.ptr().get()}) module->to(test_device());
  const auto block = [&](const Tensor& t) { return t + down(drop(torch::gelu(up(t)))); };
  const Tensor x = torch::randn({40, 32}).to(test_device());
  const auto run = [&](bool recompute, bool autocast) {
    torch::manual_seed(33);
    for (const auto& p : {up->weight, up->bias, down->weight, down->bias}) p.mutable_grad() = Tensor();
    Tensor leaf = x.clone().requires_grad_(), y;
    {
      std::optional<headroom::detail::AutocastGuard> guard;
      if (autocast) guard.emplace(test_device().type(), at::kBFloat16);
      y = recompute ? checkpoint(block, checkpoint(block, leaf)) : block(block(leaf));
    }
    y.to(torch::kFloat).square().sum().backward();  // outside of autocast
    return std::vector<Tensor>{y.detach(), leaf.grad(), up->weight.grad(), down->bias.grad(),
                               torch::rand({5}, x.options())};
  };
  for (const bool autocast : {false, true}) {
    CAPTURE(autocast);
    const auto expected = run(false, autocast), actual = run(true, autocast);
    for (size_t i = 0; i < expected.size(); ++i) CHECK(actual[i].equal(expected[i]));
  }
  CHECK_FALSE(run(false, true)[1].equal(run(false, false)[1]));
}

TEST_CASE("offload keeps blocks' inputs in pinned memory of the host, and nothing on the device", "[gpu]") {
  SKIP_WITHOUT_DEVICE(true);
  const int64_t batch = 8, length = 2048, layers = 12, input = batch * length * 64 * 4;
  const auto held = [&](const std::string& policy) {
    nn::EncoderOptions options(64, 4, {160}, layers);
    nn::Encoder encoder(options.gradient_checkpointing(policy));
    encoder->to(test_device());
    const Tensor x = torch::randn({batch, length, 64}).to(test_device());
    const Tensor warm = encoder->forward(x);
    Tensor y;
    MemoryMeter meter(test_device());
    const MemoryReport report = meter.measure([&] { y = encoder->forward(x), synchronize(); });
    y.sum().backward();
    return report.held();
  };
  CHECK(held("full") >= (layers - 1) * input);
  CHECK(held("full+offload") <= 4 * input);  // the output, and two copies on their way
}

TEST_CASE("many tensors on their way to the host and back arrive whole", "[gpu]") {
  SKIP_WITHOUT_DEVICE(false);
  const Deterministic deterministic;
  const auto deep = [&](const std::string& policy) {
    torch::manual_seed(34);
    nn::EncoderOptions options(16, 2, {32}, 40);
    nn::Encoder encoder(options.gradient_checkpointing(policy));
    encoder->to(test_device());
    const Tensor x = torch::randn({4, 300, 16}).to(test_device()).requires_grad_();
    encoder->forward(x).square().sum().backward();
    return x.grad();
  };
  const Tensor expected = deep("none");
  for (int repeat = 0; repeat < 5; ++repeat) CHECK(deep("full+offload").equal(expected));
}
