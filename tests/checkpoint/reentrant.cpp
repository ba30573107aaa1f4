#include "headroom/checkpoint/reentrant.hpp"

#include <torch/torch.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/memory.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::check_equal;
using testing::with_gradient;
using torch::Tensor;
using torch::autograd::grad;

namespace {

/// Linear, GELU, dropout, linear, and what it needs to be told to a reentrant checkpoint.
struct Network {
  torch::nn::Linear up{6, 20}, down{20, 6};

  Tensor operator()(const Tensor& x) { return x + down(torch::dropout(torch::gelu(up(x)), 0.3, true)); }
  std::vector<Tensor> parameters() const {
    std::vector<Tensor> all = up->parameters();
    for (const Tensor& p : down->parameters()) all.push_back(p);
    return all;
  }
};

/// Output, gradients of x and the parameters, and random numbers drawn after forward and after backward.
template <class F>
std::vector<Tensor> results(F&& forward, const Tensor& x, const std::vector<Tensor>& parameters) {
  torch::manual_seed(3);
  const Tensor y = forward(x), drawn = torch::rand({2});
  std::vector<Tensor> inputs{x};
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  auto all = grad({y.sin().sum()}, inputs);
  all.insert(all.end(), {y, drawn, torch::rand({2})});
  return all;
}

}  // namespace

TEST_CASE("a reentrant checkpoint gives the bits of the plain call, alone, within and around checkpoints") {
  torch::manual_seed(1);
  Network network;
  const auto parameters = network.parameters();
  const Tensor x = torch::randn({5, 6}, with_gradient);
  const auto twice = [&](const Tensor& t) { return network(network(t)); };
  const auto once = [&](const Tensor& t) { return reentrant_checkpoint(parameters, network, t); };
  const auto expected = results(twice, x, parameters);
  check_equal(results([&](const Tensor& t) { return reentrant_checkpoint(parameters, twice, t); }, x, parameters),
              expected);
  check_equal(results([&](const Tensor& t) { return once(once(t)); }, x, parameters), expected);
  SECTION("within checkpoint()") {
    check_equal(results([&](const Tensor& t) { return checkpoint([&](const Tensor& u) { return once(once(u)); }, t); },
                        x, parameters),
                expected);
  }
  SECTION("around checkpoint(), and around itself") {
    const auto inner = [&](const Tensor& t) { return checkpoint(network, checkpoint(network, t)); };
    check_equal(results([&](const Tensor& t) { return reentrant_checkpoint(parameters, inner, t); }, x, parameters),
                expected);
    const auto itself = [&](const Tensor& t) { return once(once(t)); };
    check_equal(results([&](const Tensor& t) { return reentrant_checkpoint(parameters, itself, t); }, x, parameters),
                expected);
  }
  SECTION("a second backward needs retain_graph, and gives the same again") {
    torch::manual_seed(3);
    const Tensor loss = once(x).sum();
    const auto first = grad({loss}, parameters, {}, true), second = grad({loss}, parameters);
    check_equal(second, first);
    CHECK_THROWS_WITH(grad({loss}, parameters), Catch::Contains("second time"));
  }
  SECTION("inputs are kept where the enclosing hooks or the policy say") {
    int packed = 0;
    const auto counting = [&](const Tensor& t) -> Unpack {
      ++packed;
      return [copy = t.clone()] { return copy; };
    };
    check_equal(results(
                    [&](const Tensor& t) {
                      const SavedTensorHooks hooks(counting);
                      return reentrant_checkpoint(parameters, twice, t);
                    },
                    x, parameters),
                expected);
    CHECK(packed == 1);
  }
}

TEST_CASE("a reentrant checkpoint holds its inputs until its backward") {
  torch::manual_seed(1);
  torch::nn::Linear layer(64, 64);
  const Tensor x = torch::randn({1000, 64}, with_gradient);
  const auto block = [&](const Tensor& t) { return layer(layer(t).tanh()).tanh(); };
  const auto stack = [&](const Tensor& t) {
    return reentrant_checkpoint(layer->parameters(), block, reentrant_checkpoint(layer->parameters(), block, t * 1));
  };
  stack(x).sum().backward();
  const MemoryMeter meter;
  const int64_t of_x = 1000 * 64 * 4, state = 5056 * 2;
  Tensor y;
  const MemoryReport forward = meter.measure([&] { y = stack(x); });
  CHECK(forward.held() <= 3 * of_x + state);  // two inputs and the output
  const Tensor loss = y.sum();
  y = Tensor();
  x.mutable_grad() = Tensor();
  const MemoryReport backward = meter.measure([&] { loss.backward(); });
  CHECK(backward.held() <= of_x - 2 * of_x + state);  // the gradient of x instead of the inputs, while the graph lives
}

TEST_CASE("a reentrant checkpoint takes and returns several tensors") {
  torch::manual_seed(2);
  const Tensor a = torch::randn({4, 3}, with_gradient), b = torch::randn({4, 3}, with_gradient),
               without = torch::randn({4, 3}), places = torch::tensor({2, 0, 1, 3});
  const auto forward = [](const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& places) {
    return std::tuple(a * b + c, a.index_select(0, places).exp(), a.argmax(1));
  };
  const auto call = [&] { return reentrant_checkpoint({}, forward, a, b, without, places); };
  const auto expected = forward(a, b, without, places);
  const auto actual = call();
  CHECK(torch::equal(std::get<0>(actual), std::get<0>(expected)));
  CHECK(torch::equal(std::get<1>(actual), std::get<1>(expected)));
  CHECK(torch::equal(std::get<2>(actual), std::get<2>(expected)));
  CHECK_FALSE(std::get<2>(actual).requires_grad());
  check_equal(grad({(std::get<0>(actual) * std::get<1>(actual)).sum()}, {a, b}),
              grad({(std::get<0>(expected) * std::get<1>(expected)).sum()}, {a, b}));
  // one output alone, of which b is no part
  const auto second = call();
  const auto of_second = grad({std::get<1>(second).sum()}, {a, b}, {}, {}, false, /*allow_unused=*/true);
  CHECK(torch::equal(of_second[0], grad({a.index_select(0, places).exp().sum()}, {a})[0]));
  CHECK_FALSE(of_second[1].defined());

  SECTION("a vector") {
    const auto split = [](const Tensor& t) { return t.exp().split(1); };
    const std::vector<Tensor> parts = reentrant_checkpoint({}, split, a);
    REQUIRE(parts.size() == 4);
    check_equal(grad({parts[1].sum() + parts[3].sin().sum()}, {a}),
                grad({split(a)[1].sum() + split(a)[3].sin().sum()}, {a}));
  }
  SECTION("an input itself, or a view of one") {
    const auto same = reentrant_checkpoint(
        {}, [](const Tensor& t) { return std::tuple(t, t.t()); }, a);
    CHECK(torch::equal(std::get<1>(same), a.t()));
    check_equal(grad({(std::get<0>(same) * std::get<1>(same).t()).sum()}, {a}), grad({a.square().sum()}, {a}));
  }
  SECTION("a captured constant, which stays one") {
    const auto [product, constant] = reentrant_checkpoint(
        {}, [&](const Tensor& t) { return std::tuple(t * without, without); }, a);
    CHECK(torch::equal(grad({(product * constant).sum()}, {a})[0], without * without));
    CHECK_FALSE(without.requires_grad());
  }
  SECTION("nothing needs a gradient: a plain call") {
    int calls = 0;
    const auto counted = [&](const Tensor& t) {
      ++calls;
      return t.exp();
    };
    CHECK_FALSE(reentrant_checkpoint({}, counted, without).requires_grad());
    const torch::NoGradGuard no_grad;
    CHECK_FALSE(reentrant_checkpoint({}, counted, a).requires_grad());
    CHECK(calls == 2);
  }
}

TEST_CASE("hooks of parameters fire once for a reentrant checkpoint, autocast is replayed") {
  torch::manual_seed(4);
  torch::nn::Linear layer(8, 8);
  const Tensor x = torch::randn({12, 8}, with_gradient);
  int fired = 0;
  layer->weight.register_hook([&](const Tensor&) { ++fired; });
  const auto run = [&](auto&& call) {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const Tensor y = call();
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    CHECK(y.scalar_type() == torch::kBFloat16);
    fired = 0;
    return grad({y.to(torch::kFloat).pow(2).sum()}, {x, layer->weight, layer->bias});
  };
  const auto forward = [&](const Tensor& t) { return layer(layer(t).tanh()); };
  const auto expected = run([&] { return forward(x); });
  const auto actual = run([&] { return reentrant_checkpoint(layer->parameters(), forward, x); });
  CHECK(fired == 1);
  check_equal(actual, expected);
}

TEST_CASE("a reentrant checkpoint needs no engine of ours") {
  struct Foreign : torch::autograd::Engine {
    std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override { return nullptr; }
  };
  static Foreign foreign;
  static torch::autograd::Engine& before = torch::autograd::Engine::get_default_engine();
  struct Installed {
    Installed() {
      torch::autograd::set_default_engine_stub([]() -> torch::autograd::Engine& { return foreign; });
    }
    ~Installed() {
      torch::autograd::set_default_engine_stub([]() -> torch::autograd::Engine& { return before; });
    }
  };
  torch::manual_seed(5);
  Network network;
  const auto parameters = network.parameters();
  const Tensor x = torch::randn({5, 6}, with_gradient);
  const auto expected = results(network, x, parameters);
  const Installed installed;
  check_equal(results([&](const Tensor& t) { return reentrant_checkpoint(parameters, network, t); }, x, parameters),
              expected);
}

TEST_CASE("a forward that goes another way to the same values is no error in a reentrant checkpoint") {
  const Tensor x = torch::randn({4, 3}, with_gradient);
  int calls = 0;
  const auto forward = [&](const Tensor& t) { return ++calls == 1 ? t.exp() : t.unsqueeze(0).exp().squeeze(0); };
  const Tensor y = reentrant_checkpoint({}, forward, x);
  CHECK(torch::equal(grad({y.sum()}, {x})[0], x.exp()));
  calls = 0;
  const Tensor z = checkpoint(forward, x);
  CHECK(testing::error_of([&] { z.sum().backward(); }).id() == "headroom.checkpoint.mismatch");
}

TEST_CASE("bad use of reentrant checkpoints") {
  torch::manual_seed(6);
  torch::nn::Linear layer(4, 4);
  const Tensor x = torch::randn({6, 4}, with_gradient);
  const auto forward = [&](const Tensor& t) { return layer(t).exp(); };
  const auto id = [](auto&& f) { return testing::error_of(f).id(); };
  SECTION("a captured leaf that needs a gradient, in any of the outputs") {
    const auto both = [&](const Tensor& t) { return std::tuple(t.exp(), layer(t)); };
    const auto [first, second] = reentrant_checkpoint({layer->weight}, both, x);
    const Error error = testing::error_of([&] { (first + second).sum().backward(); });
    CHECK(error.id() == "headroom.checkpoint.captured");
    CHECK(testing::contains(error.what(), "a tensor [4]"));
    const Tensor captured = torch::randn({6, 4}, with_gradient);
    CHECK(id([&] {
            reentrant_checkpoint(
                {}, [&](const Tensor&) { return captured; }, x)
                .sum()
                .backward();
          }) == "headroom.checkpoint.captured");
  }
  SECTION("undefined tensors") {
    CHECK(id([&] {
            reentrant_checkpoint(
                {}, [](const Tensor& t, const Tensor&) { return t; }, x, Tensor());
          }) == "headroom.checkpoint.undefined");
    CHECK(id([&] {
            reentrant_checkpoint(
                {}, [](const Tensor& t) { return std::tuple(t, Tensor()); }, x);
          }) == "headroom.checkpoint.undefined");
  }
  SECTION("second derivatives") {
    const Tensor y = reentrant_checkpoint(layer->parameters(), forward, x);
    const Error error = testing::error_of([&] { grad({y.sum()}, {x}, {}, true, /*create_graph=*/true); });
    CHECK(error.id() == "headroom.checkpoint.second_derivative");
    CHECK(testing::contains(error.what(), "a reentrant or tiled checkpoint"));
  }
  SECTION("a parameter or an input changed before backward") {
    const Tensor y = reentrant_checkpoint(layer->parameters(), forward, x);
    {
      const torch::NoGradGuard no_grad;
      layer->bias.add_(1);
    }
    CHECK(id([&] { y.sum().backward(); }) == "headroom.checkpoint.modified");
    Tensor input = x * 1;
    const Tensor z = reentrant_checkpoint(layer->parameters(), forward, input);
    input.add_(1);
    CHECK(id([&] { z.sum().backward(); }) == "headroom.checkpoint.modified");
  }
  SECTION("forward changes its input in place") {
    CHECK(id([&] {
            reentrant_checkpoint(
                {}, [](Tensor t) { return t.mul_(2).exp(); }, x * 1);
          }) == "headroom.checkpoint.modified");
  }
  SECTION("forward raises in backward: everything is restored, the next backward works") {
    int calls = 0;
    const Tensor y = reentrant_checkpoint(
        layer->parameters(),
        [&](const Tensor& t) {
          const Tensor h = torch::dropout(t, 0.5, true);
          if (++calls == 2) throw std::runtime_error("no");
          return layer(h);
        },
        x);
    torch::manual_seed(11);
    const Tensor next = torch::rand({2});
    torch::manual_seed(11);
    CHECK_THROWS_WITH(y.sum().backward(), "no");
    CHECK(torch::equal(torch::rand({2}), next));
    y.sum().backward();
    CHECK(layer->weight.grad().defined());
  }
}
