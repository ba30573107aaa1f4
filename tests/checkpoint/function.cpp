#include "headroom/checkpoint/function.hpp"

#include <torch/torch.h>

#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "headroom/memory/meter.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::with_gradient;
using torch::Tensor;
using torch::autograd::grad;

namespace {

/// A residual feed-forward block with dropout: what a transformer saves and draws, in small.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t dim, double dropout = 0.25)
      : up(register_module("up", torch::nn::Linear(dim, 4 * dim))),
        down(register_module("down", torch::nn::Linear(4 * dim, dim))),
        drop(register_module("drop", torch::nn::Dropout(dropout))) {}

  Tensor forward(const Tensor& x) { return x + down(drop(torch::gelu(up(x)))); }

  torch::nn::Linear up, down;
  torch::nn::Dropout drop;
};
TORCH_MODULE(Block);

using Step = std::function<Tensor(const Tensor&)>;

Step plainly(Block block) {
  return [block](const Tensor& x) mutable { return block(x); };
}

Step checkpointed(Step step) {
  return [step = std::move(step)](const Tensor& x) { return checkpoint(step, x); };
}

Step chain(std::vector<Step> steps) {
  return [steps = std::move(steps)](Tensor x) {
    for (const Step& step : steps) {
      x = step(x);
    }
    return x;
  };
}

struct Run {
  std::vector<Tensor> gradients;  // of the input, then of the parameters
  Tensor output;
  Tensor next_random;  // the first number drawn afterwards
};

Run run(const Step& step, const std::vector<Tensor>& parameters, const Tensor& input, int backwards = 1) {
  torch::manual_seed(7);
  Run result;
  const Tensor x = input.detach().clone().requires_grad_(input.requires_grad());
  for (const Tensor& p : parameters) {
    p.mutable_grad() = Tensor();
  }
  for (int i = 0; i < backwards; ++i) {
    result.output = step(x);
    result.output.pow(2).sum().backward();
  }
  result.gradients.push_back(x.grad());
  for (const Tensor& p : parameters) {
    result.gradients.push_back(p.grad());
  }
  result.next_random = torch::rand({4});
  return result;
}

void check_same(const Run& actual, const Run& expected) {
  CHECK(torch::equal(actual.output, expected.output));
  CHECK(torch::equal(actual.next_random, expected.next_random));
  REQUIRE(actual.gradients.size() == expected.gradients.size());
  for (std::size_t i = 0; i < expected.gradients.size(); ++i) {
    REQUIRE(actual.gradients[i].defined() == expected.gradients[i].defined());
    CHECK((!expected.gradients[i].defined() || torch::equal(actual.gradients[i], expected.gradients[i])));
  }
}

constexpr std::int64_t dim = 16;
}  // namespace

TEST_CASE("gradients, outputs and later random numbers are those of the plain call, bit for bit") {
  torch::manual_seed(1);
  std::vector<Block> blocks;
  std::vector<Step> plain, separate;
  std::vector<Tensor> parameters;
  for (int i = 0; i < 3; ++i) {
    blocks.emplace_back(dim);
    plain.push_back(plainly(blocks.back()));
    separate.push_back(checkpointed(plain.back()));
    for (const Tensor& p : blocks.back()->parameters()) {
      parameters.push_back(p);
    }
  }
  const Tensor x = torch::randn({5, 7, dim}, with_gradient);
  const Run expected = run(chain(plain), parameters, x);

  SECTION("each block") { check_same(run(chain(separate), parameters, x), expected); }
  SECTION("all blocks at once") { check_same(run(checkpointed(chain(plain)), parameters, x), expected); }
  SECTION("nested twice") { check_same(run(checkpointed(checkpointed(chain(separate))), parameters, x), expected); }
  SECTION("an input without requires_grad: the parameters still get theirs") {
    const Run only_parameters = run(checkpointed(chain(separate)), parameters, x.detach());
    CHECK_FALSE(only_parameters.gradients[0].defined());
    check_same(only_parameters, run(chain(plain), parameters, x.detach()));
  }
  SECTION("gradients accumulate over steps") {
    check_same(run(chain(separate), parameters, x, 3), run(chain(plain), parameters, x, 3));
  }
  SECTION("a view as input") {
    const auto on_view = [](Step step) {
      return [step](const Tensor& whole) { return step(whole.transpose(0, 1).slice(0, 2, 6)); };
    };
    check_same(run(on_view(chain(separate)), parameters, x), run(on_view(chain(plain)), parameters, x));
  }
  SECTION("an output that is a view of the input") {
    const Step view = [](const Tensor& t) { return t.transpose(0, 1); };
    const Step square = [](const Tensor& t) { return t * t; };
    check_same(run(chain({square, checkpointed(view), square}), {}, x), run(chain({square, view, square}), {}, x));
  }
}

TEST_CASE("autocast is replayed, its cache does not outlive backward, and what was set is restored") {
  torch::manual_seed(2);
  Block block(dim);
  const Tensor x = torch::randn({6, dim}, with_gradient);
  const auto under_autocast = [](Step step) {
    return [step](const Tensor& t) {
      const headroom::detail::AutocastGuard on(at::kCPU, at::kBFloat16);
      return step(t).to(torch::kFloat32);
    };
  };
  const Run expected = run(under_autocast(plainly(block)), block->parameters(), x);
  const Run full_precision = run(plainly(block), block->parameters(), x);
  REQUIRE_FALSE(torch::equal(expected.gradients[1], full_precision.gradients[1]));

  // backward of both runs happens outside of autocast
  check_same(run(under_autocast(checkpointed(plainly(block))), block->parameters(), x), expected);
  CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  // the other way round: what is set in backward must not reach the recomputation
  const auto autocast_in_backward = [&](const Step& step) {
    block->zero_grad();
    torch::manual_seed(7);
    const Tensor output = step(x);
    const headroom::detail::AutocastGuard on(at::kCPU, at::kBFloat16);
    output.pow(2).sum().backward();
    CHECK(at::autocast::is_autocast_enabled(at::kCPU));
    CHECK(at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16);
    return block->up->weight.grad();
  };
  CHECK(torch::equal(autocast_in_backward(checkpointed(plainly(block))), autocast_in_backward(plainly(block))));

  const MemoryMeter meter;
  block->zero_grad();
  const MemoryReport report = meter.measure([&] { run(under_autocast(checkpointed(plainly(block))), {}, x.detach()); });
  std::int64_t gradients = 0;
  for (const Tensor& p : block->parameters()) {
    gradients += static_cast<std::int64_t>(p.nbytes());
  }
  CHECK(report.held() <= gradients);
}

TEST_CASE("forward holds the inputs and nothing else, backward one block at a time") {
  constexpr std::int64_t rows = 256, count = 6, activation = rows * dim * sizeof(float);
  const double dropout = GENERATE(0.0, 0.25);
  std::vector<Step> plain, separate;
  std::int64_t weights = 0;
  std::vector<Block> blocks;
  for (int i = 0; i < count; ++i) {
    blocks.emplace_back(dim, dropout);
    plain.push_back(plainly(blocks.back()));
    separate.push_back(checkpointed(plain.back()));
    for (const Tensor& p : blocks.back()->parameters()) {
      p.mutable_grad() = torch::zeros_like(p);
      weights += static_cast<std::int64_t>(p.nbytes());
    }
  }
  const Tensor x = torch::randn({rows, dim}, with_gradient);
  x.mutable_grad() = torch::zeros_like(x);
  const MemoryMeter meter;
  const auto random_state = static_cast<std::int64_t>(at::detail::getDefaultCPUGenerator().get_state().nbytes());

  Tensor output;
  const auto held_by = [&](const Step& step) {
    output = Tensor();
    return meter.measure([&] { output = step(x); }).held();
  };
  const auto backward_peak = [&] {
    return meter.measure([&] { output.backward(torch::ones_like(output)); }).added_peak();
  };

  const std::int64_t one_block = held_by(plain[0]) - activation;  // without its output
  // gelu's input and output, with dropout also its mask (float, as aten::dropout makes it on the CPU) and its output
  CHECK(one_block >= 2 * 4 * activation);

  const std::int64_t held_plain = held_by(chain(plain));
  const std::int64_t peak_plain = backward_peak();
  CHECK(held_plain == count * (one_block + activation));

  // the outputs of all blocks are the inputs of the next ones and the result; random states where they were used
  const std::int64_t held = held_by(chain(separate));
  CHECK(held == count * (activation + (dropout > 0 ? random_state : 0)));
  const std::int64_t peak = backward_peak();
  // on top of the inputs: one block's saved tensors, and while it is differentiated gradients of the same size and of
  // its weights
  CHECK(peak <= 2 * one_block + 4 * activation + weights / count + random_state);
  output = Tensor();
  CHECK(held + peak < (held_plain + peak_plain) / 2);

  // nested: of the inputs only the outermost call's, which is x itself
  CHECK(held_by(checkpointed(chain(separate))) == activation + (dropout > 0 ? (count + 1) * random_state : 0));
  CHECK(backward_peak() <= count * (activation + random_state) + 2 * one_block + 5 * activation + weights / count);
  CHECK(meter.measure([&] { output = Tensor(); }).held() == -activation);
}

TEST_CASE("what follows the last saved tensor is not computed again") {
  int begun = 0, finished = 0;
  const Tensor x = torch::randn({4}, with_gradient);
  const Tensor y = checkpoint(
      [&](const Tensor& t) {
        ++begun;
        const Tensor s = t.sin();
        const Tensor sum = s.exp() + 1;
        ++finished;
        return sum;
      },
      x);
  y.sum().backward();
  CHECK(begun == 2);
  CHECK(finished == 1);
  CHECK(torch::equal(x.grad(), x.detach().sin().exp() * x.detach().cos()));
}

TEST_CASE("forward may take and return several tensors and other things") {
  const Tensor a = torch::randn({3, 4}, with_gradient);
  const Tensor b = torch::randn({3, 4}, with_gradient);
  const auto values = [](const std::vector<Tensor>& outputs) {
    return grad({outputs[0].sum() + outputs[1].pow(3).sum()}, {outputs[2], outputs[3]});
  };
  SECTION("tuple") {
    const auto f = [](const Tensor& p, const Tensor& q, double factor) {
      return std::make_tuple((p * q).exp(), (p.sin() * factor));
    };
    const auto [u, v] = checkpoint(f, a, b, 0.5);
    const auto [eu, ev] = f(a, b, 0.5);
    const auto actual = values({u, v, a, b}), expected = values({eu, ev, a, b});
    CHECK(torch::equal(actual[0], expected[0]));
    CHECK(torch::equal(actual[1], expected[1]));
  }
  SECTION("vector, optional and an undefined tensor") {
    const auto f = [](std::vector<Tensor> list, const std::optional<Tensor>& shift, const Tensor& mask) {
      const Tensor shifted = shift ? list[0] + *shift : list[0];
      return std::vector<Tensor>{(shifted * list[1]).tanh(), mask.defined() ? list[1] * mask : list[1].exp()};
    };
    const auto outputs = checkpoint(f, std::vector{a, b}, std::optional(b), Tensor());
    const auto plain = f({a, b}, b, {});
    const auto actual = values({outputs[0], outputs[1], a, b}), expected = values({plain[0], plain[1], a, b});
    CHECK(torch::equal(actual[0], expected[0]));
    CHECK(torch::equal(actual[1], expected[1]));
  }
  SECTION("an output that nobody uses") {
    const auto [u, v] = checkpoint([](const Tensor& p) { return std::make_tuple(p.exp(), p.sin().exp()); }, a);
    CHECK(torch::equal(grad({u.sum()}, {a})[0], a.detach().exp()));
  }
  SECTION("a captured tensor with a graph gets its gradient") {
    const Tensor inner = b.exp();
    const Tensor y = checkpoint([inner](const Tensor& p) { return (p * inner).sin(); }, a);
    const auto actual = grad({y.sum()}, {a, b});
    const auto expected = grad({(a * b.exp()).sin().sum()}, {a, b});
    CHECK(torch::equal(actual[0], expected[0]));
    CHECK(torch::equal(actual[1], expected[1]));
  }
}

TEST_CASE("without gradients it is a plain call that holds nothing") {
  Block block(dim, 0.0);
  const Tensor x = torch::randn({5, dim});
  const Tensor expected = block(x).detach();
  const auto check = [&] {
    int calls = 0;
    const Tensor y = checkpoint(
        [&](const Tensor& t) {
          ++calls;
          CHECK(SavedTensorHooks::current() == nullptr);
          return block(t);
        },
        x);
    CHECK(calls == 1);
    CHECK(torch::equal(y, expected));
    CHECK_FALSE(y.requires_grad());
  };
  SECTION("no_grad") {
    const torch::NoGradGuard no_grad;
    check();
  }
  SECTION("inference mode") {
    const c10::InferenceMode inference;
    check();
  }
}

TEST_CASE("a second backward needs retain_graph, and then gives the same gradients again") {
  Block block(dim);
  const Tensor x = torch::randn({5, dim}, with_gradient);
  const Tensor loss = checkpoint(block, x).pow(2).sum();
  const auto first = grad({loss}, {x, block->up->weight}, {}, /*retain_graph=*/true);
  const auto second = grad({loss}, {x, block->up->weight});
  CHECK(torch::equal(first[0], second[0]));
  CHECK(torch::equal(first[1], second[1]));
  try {
    loss.backward();
    FAIL("expected LibTorch's error");
  } catch (const c10::Error& error) {
    CHECK(testing::contains(error.what(), "backward through the graph a second time"));
  }
}

TEST_CASE("second derivatives are right") {
  const Tensor x = torch::randn({6}, with_gradient.dtype(torch::kFloat64));
  const Step cube_of_sine = [](const Tensor& t) { return t.sin().pow(3); };
  const auto second = [&](const Step& step) {
    const Tensor first = grad({step(x).sum()}, {x}, {}, true, /*create_graph=*/true)[0];
    return grad({first.pow(2).sum()}, {x})[0];
  };
  CHECK(torch::equal(second(checkpointed(cube_of_sine)), second(cube_of_sine)));
  CHECK(torch::equal(second(checkpointed(checkpointed(cube_of_sine))), second(cube_of_sine)));
}

TEST_CASE("forward may differentiate inside") {
  const Tensor x = torch::randn({6}, with_gradient.dtype(torch::kFloat64));
  const Step slope = [](const Tensor& t) {
    const Tensor energy = (t.exp() * t.sin()).sum();
    return grad({energy}, {t}, {}, true, true)[0] * t;
  };
  CHECK(torch::equal(grad({checkpoint(slope, x).sum()}, {x})[0], grad({slope(x).sum()}, {x})[0]));
}

TEST_CASE("an exception of the recomputation reaches the caller, with everything restored") {
  const Tensor x = torch::randn({4}, with_gradient);
  int calls = 0;
  const Tensor y = checkpoint(
      [&](const Tensor& t) {
        const Tensor h = torch::dropout(t.exp(), 0.5, true);
        if (++calls == 2) {
          throw std::runtime_error("the second call fails");
        }
        return h.sin().exp();
      },
      x);
  torch::manual_seed(11);
  const Tensor expected = torch::rand({3});
  torch::manual_seed(11);
  const MemoryMeter meter;
  const MemoryReport report =
      meter.measure([&] { CHECK_THROWS_WITH(y.sum().backward({}, true), "the second call fails"); });
  CHECK(report.held() == 0);
  CHECK(SavedTensorHooks::current() == nullptr);
  CHECK(torch::equal(torch::rand({3}), expected));
  CHECK_NOTHROW(y.sum().backward());  // the third call works
}

TEST_CASE("memory that runs out in the recomputation is LibTorch's error and leaks nothing") {
  Block block(dim);
  const Tensor x = torch::randn({64, dim}, with_gradient);
  MemoryMeter meter;
  const std::int64_t before = meter.live();
  const MemoryReport whole = meter.measure([&] {
    const Tensor loss = checkpoint(block, x).sum();
    std::ignore = grad({loss}, {x});
  });
  for (const double share : {0.5, 0.7, 0.9, 0.99}) {
    torch::manual_seed(13);
    const Tensor loss = checkpoint(block, x).sum();
    const Tensor drawn = torch::rand({3});
    torch::manual_seed(13);
    std::ignore = checkpoint(block, x);
    meter.set_limit(before + static_cast<std::int64_t>(share * static_cast<double>(whole.added_peak())));
    CHECK_THROWS_AS(grad({loss}, {x}), c10::OutOfMemoryError);
    meter.set_limit(std::nullopt);
    CHECK(torch::equal(torch::rand({3}), drawn));
  }
  CHECK(meter.live() == before);
}

TEST_CASE("an engine that somebody else installed is not replaced") {
  struct Foreign : torch::autograd::Engine {};
  const Foreign engine;
  const Error error = testing::error_of([&] { headroom::detail::require_stock_engine(engine); });
  CHECK(error.id() == "headroom.checkpoint.engine");
  CHECK(testing::contains(error.what(), "torch.utils.checkpoint"));
}

TEST_CASE("a forward that throws leaves nothing behind") {
  const Tensor x = torch::randn({4}, with_gradient);
  const MemoryMeter meter;
  const MemoryReport report = meter.measure([&] {
    CHECK_THROWS_WITH(checkpoint(
                          [](const Tensor& t) -> Tensor {
                            const Tensor h = t.exp().sin();
                            throw std::runtime_error("no");
                          },
                          x),
                      "no");
  });
  CHECK(report.held() == 0);
  CHECK(SavedTensorHooks::current() == nullptr);
}

TEST_CASE("a forward that does something else the second time is an error") {
  const Tensor x = torch::randn({4, 3}, with_gradient);
  int calls = 0;
  SECTION("other shapes") {
    const Tensor y =
        checkpoint([&](const Tensor& t) { return (++calls == 1 ? t : t.slice(0, 0, 2)).sin().exp().sum(); }, x);
    const Error error = testing::error_of([&] { y.backward(); });
    CHECK(error.id() == "headroom.checkpoint.mismatch");
    CHECK(testing::contains(error.what(), "[2, 3]"));
    CHECK(testing::contains(error.what(), "[4, 3]"));
  }
  SECTION("fewer tensors") {
    const Tensor y = checkpoint([&](const Tensor& t) { return ++calls == 1 ? t.exp().exp().exp() : t.exp(); }, x);
    const Error error = testing::error_of([&] { y.sum().backward(); });
    CHECK(error.id() == "headroom.checkpoint.mismatch");
    CHECK(testing::contains(error.what(), "fewer tensors than forward, which saved 3"));
  }
}

TEST_CASE("changes in place between forward and backward are errors, not wrong gradients") {
  const Tensor leaf = torch::randn({4}, with_gradient);
  const Tensor weight = torch::randn({4}, with_gradient);
  const auto check = [](const Tensor& y) {
    const Error error = testing::error_of([&] { y.sum().backward(); });
    CHECK(error.id() == "headroom.checkpoint.modified");
    CHECK(testing::contains(error.what(), "shape [4]"));
  };
  const auto f = [weight](const Tensor& t) { return (t * weight).sin(); };
  SECTION("of an input") {
    Tensor x = leaf * 1;
    const Tensor y = checkpoint(f, x);
    x.add_(1);
    check(y);
  }
  SECTION("of the base of an input") {
    Tensor base = torch::zeros({8});
    const Tensor y = checkpoint(f, base.slice(0, 0, 4));
    base.add_(1);
    check(y);
  }
  SECTION("of a parameter that forward saved") {
    const Tensor y = checkpoint(f, leaf);
    {
      const torch::NoGradGuard no_grad;
      weight.add_(1);
    }
    check(y);
  }
  SECTION("of its input by forward itself") {
    const Tensor x = leaf * 1;
    check(checkpoint([](Tensor t) { return t.add_(1).sin(); }, x));
  }
  SECTION("of a tensor that autograd saved inside forward") {
    check(checkpoint(
        [](const Tensor& t) {
          Tensor h = t.exp();
          const Tensor s = h.sin();
          h.add_(1);
          return s.exp();
        },
        leaf));
  }
  SECTION("of an inner checkpoint's input inside an outer one") {
    check(checkpoint(
        [&](const Tensor& t) {
          Tensor h = t + 1;
          const Tensor y = checkpoint(f, h);
          h.add_(1);
          return y + h.exp();
        },
        leaf));
  }
}

TEST_CASE("autograd functions written in C++ are covered") {
  struct Cube : torch::autograd::Function<Cube> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& t) {
      context->save_for_backward({t});
      return t.pow(3);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   torch::autograd::variable_list gradients) {
      const Tensor t = context->get_saved_variables()[0];
      return {gradients[0] * 3 * t.pow(2) + 0 * context->get_saved_variables()[0]};  // asking twice is allowed
    }
  };
  const Tensor x = torch::randn({1000}, with_gradient);
  const auto f = [](const Tensor& t) { return Cube::apply(t + 1).sum(); };
  const MemoryMeter meter;
  Tensor y;
  CHECK(meter.measure([&] { y = checkpoint(f, x); }).held() == sizeof(float));
  CHECK(torch::equal(grad({y}, {x})[0], grad({f(x)}, {x})[0]));
}

TEST_CASE("threads checkpoint and differentiate independently, also one graph from two threads") {
  torch::manual_seed(3);
  Block block(dim, 0.0);
  const Step step = checkpointed(plainly(block));
  std::vector<Tensor> inputs, actual(4), expected;
  for (int i = 0; i < 4; ++i) {
    inputs.push_back(torch::randn({5, dim}, with_gradient));
    expected.push_back(grad({block(inputs[i]).sin().sum()}, {inputs[i]})[0]);
  }
  const Tensor shared = step(inputs[0]).sin().sum();
  std::vector<Tensor> from_shared(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        actual[i] = grad({step(inputs[i]).sin().sum()}, {inputs[i]})[0];
        from_shared[i] = grad({shared}, {inputs[0]}, {}, /*retain_graph=*/true)[0];
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int i = 0; i < 4; ++i) {
    CHECK(torch::equal(actual[i], expected[i]));
    CHECK(torch::equal(from_shared[i], expected[0]));
  }
}

TEST_CASE("a recomputation that draws nothing leaves the generator alone") {
  const Tensor x = torch::randn({4}, with_gradient);
  torch::manual_seed(5);
  const Tensor y = checkpoint(
      [calls = 0](const Tensor& t) mutable {
        const Tensor h = t.exp().sin().exp();
        return ++calls == 1 ? h : h + torch::rand({4});
      },
      x);
  const Tensor first = torch::rand({2});
  y.sum().backward();
  const Tensor second = torch::rand({2});
  torch::manual_seed(5);
  CHECK(torch::equal(torch::cat({first, second}), torch::rand({4})));
}

TEST_CASE("saved-tensor hooks see what autograd saves, inside and around checkpoints") {
  const Tensor x = torch::randn({8}, with_gradient);
  int packed = 0, unpacked = 0;
  Tensor y;
  {
    const SavedTensorHooks hooks([&](const Tensor& t) -> Unpack {
      ++packed;
      return [&unpacked, stored = t.to(torch::kFloat64)] {
        ++unpacked;
        return stored.to(torch::kFloat32);
      };
    });
    CHECK(SavedTensorHooks::current() == &hooks);
    // sin's input; the input of the checkpoint; the inside of the checkpoint is recomputed, nothing is packed there
    y = checkpoint([](const Tensor& t) { return t.exp().exp(); }, x.sin());
  }
  CHECK(SavedTensorHooks::current() == nullptr);
  CHECK(packed == 2);
  CHECK(unpacked == 0);
  y.sum().backward();
  CHECK(unpacked == 2);
  const Tensor s = x.detach().sin();
  CHECK(torch::allclose(x.grad(), s.exp().exp() * s.exp() * x.detach().cos()));
}
