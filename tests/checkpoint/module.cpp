#include "headroom/checkpoint/module.hpp"

#include <torch/torch.h>

#include <sstream>
#include <string>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::check_equal;
using torch::Tensor;

namespace {

struct FeedForwardOptions {
  /* implicit */ FeedForwardOptions(std::int64_t dim) : dim_(dim) {}
  TORCH_ARG(std::int64_t, dim);
  TORCH_ARG(std::int64_t, expansion) = 4;
};

/// A module in LibTorch's shape, with a default argument.
struct FeedForwardImpl : torch::nn::Cloneable<FeedForwardImpl> {
  explicit FeedForwardImpl(FeedForwardOptions options_) : options(options_) { reset(); }

  void reset() override {
    const std::int64_t hidden = options.dim() * options.expansion();
    up = register_module("up", torch::nn::Linear(options.dim(), hidden));
    down = register_module("down", torch::nn::Linear(hidden, options.dim()));
    scale = register_parameter("scale", torch::ones({options.dim()}));
  }

  void pretty_print(std::ostream& stream) const override { stream << "FeedForward(" << options.dim() << ")"; }

  Tensor forward(const Tensor& x, const Tensor& mask = {}) {
    const Tensor y = down(up(x).tanh()) * scale;
    return mask.defined() ? y * mask : y;
  }

  FeedForwardOptions options;
  torch::nn::Linear up{nullptr}, down{nullptr};
  Tensor scale;
};
TORCH_MODULE(FeedForward);

std::vector<std::string> names(const torch::nn::Module& module) { return module.named_parameters().keys(); }

std::vector<Tensor> gradients(torch::nn::Module& module, const Tensor& output) {
  module.zero_grad();
  output.pow(2).sum().backward();
  std::vector<Tensor> result;
  for (const Tensor& p : module.parameters()) {
    result.push_back(p.grad().clone());
  }
  return result;
}

}  // namespace

TEST_CASE("a checkpointed module has the names, options and type of the plain one") {
  FeedForward plain(FeedForwardOptions(8).expansion(2));
  Checkpointed<FeedForward> block(FeedForwardOptions(8).expansion(2));
  CHECK(names(*block) == names(*plain));
  CHECK(names(*block) == std::vector<std::string>{"scale", "up.weight", "up.bias", "down.weight", "down.bias"});
  CHECK(block->options.expansion() == 2);
  CHECK(block->as<FeedForwardImpl>() != nullptr);
  std::ostringstream text;
  text << *block;
  CHECK(text.str().starts_with("Checkpointed<FeedForward(8)>("));

  std::stringstream archive;
  torch::save(plain, archive);
  torch::load(block, archive);
  check_equal(block->parameters(), plain->parameters());
}

TEST_CASE("a checkpointed module computes and differentiates as the plain one and holds only its input") {
  torch::manual_seed(4);
  FeedForward plain(16);
  Checkpointed<FeedForward> block(*plain);
  CHECK(block->scale.is_same(plain->scale));  // made from a module: shares its parameters
  const Tensor x = torch::randn({10, 16});
  const Tensor mask = torch::randn({10, 16});
  check_equal(gradients(*block, block(x)), gradients(*plain, plain(x)));
  check_equal(gradients(*block, block(x, mask)), gradients(*plain, plain(x, mask)));
  check_equal(gradients(*block, block->forward(x, mask)), gradients(*plain, plain(x, mask)));

  const MemoryMeter meter;
  Tensor y;
  const MemoryReport report = meter.measure([&] { y = block(x); });
  CHECK(report.held() == static_cast<std::int64_t>(y.nbytes()));
}

TEST_CASE("it fits into Sequential, and clones stay checkpointed with parameters of their own") {
  torch::manual_seed(5);
  FeedForward single(8);
  Checkpointed<torch::nn::Linear> linear(torch::nn::LinearOptions(8, 8).bias(false));
  torch::nn::Sequential model(linear, torch::nn::GELU(), Checkpointed<torch::nn::Linear>(8, 3));
  CHECK(names(*model) == std::vector<std::string>{"0.weight", "2.weight", "2.bias"});
  CHECK(model->forward(torch::ones({2, 8})).sizes() == at::IntArrayRef({2, 3}));

  Checkpointed<FeedForward> block(*single);
  const auto copy = std::dynamic_pointer_cast<Checkpointed<FeedForward>::Impl>(block->clone());
  REQUIRE(copy != nullptr);
  CHECK(names(*copy) == names(*block));
  check_equal(copy->parameters(), block->parameters());
  CHECK_FALSE(copy->scale.is_same(block->scale));
  CHECK(copy->scale.is_same(copy->named_parameters()["scale"]));
  CHECK_FALSE(copy->up->weight.is_same(block->up->weight));
  check_equal(gradients(*copy, copy->recompute(torch::ones({2, 8}))), gradients(*single, single(torch::ones({2, 8}))));

  copy->eval();
  CHECK_FALSE(copy->up->is_training());
  CHECK(block->up->is_training());
}

TEST_CASE("the module lives until backward") {
  const Tensor x = torch::randn({3, 8}, torch::requires_grad());
  Tensor y;
  {
    Checkpointed<FeedForward> block(FeedForwardOptions(8));
    y = block(x);
  }
  CHECK_NOTHROW(y.sum().backward());
  CHECK(x.grad().defined());
}

TEST_CASE("parameters that change between forward and backward are an error, even those that nothing saved") {
  Checkpointed<FeedForward> block(FeedForwardOptions(8));
  const Tensor y = block(torch::ones({2, 8}));
  {
    const torch::NoGradGuard no_grad;
    block->up->bias.add_(1);  // linear does not save its bias
  }
  const Error error = testing::error_of([&] { y.sum().backward(); });
  CHECK(error.id() == "headroom.checkpoint.modified");
  CHECK(testing::contains(error.what(), "step the optimizer after backward"));
}
