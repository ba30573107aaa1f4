#include "headroom/checkpoint/tiled.hpp"

#include <torch/torch.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::with_gradient;
using torch::Tensor;
using torch::autograd::grad;

namespace {

double relative_error(const Tensor& actual, const Tensor& exact) {
  return ((actual.to(torch::kDouble) - exact).abs().max() / exact.abs().max()).item<double>();
}

}  // namespace

TEST_CASE("a feed-forward network tiled over tokens needs memory for one slice, whatever its width") {
  torch::manual_seed(1);
  const Tensor x = torch::randn({4096, 16}, with_gradient), weights = torch::randn_like(x);
  int64_t peaks[2];
  for (const int wide : {0, 1}) {
    nn::FeedForward network(nn::FeedForwardOptions(16, {wide ? 512 : 128}));
    const auto parameters = network->parameters();
    const auto gradients = [&](const Tensor& y, const Tensor& input) {
      std::vector<Tensor> inputs{input};
      inputs.insert(inputs.end(), parameters.begin(), parameters.end());
      return grad({y}, inputs, {weights.to(y.scalar_type())});
    };
    const auto forward = [&](const Tensor& t) { return network->forward(t); };
    const auto tiled = [&](const Tensor& t) { return tiled_checkpoint(forward, t, 0, 64, parameters); };
    const auto plain = gradients(network->forward(x), x);
    const Tensor y = tiled(x);
    const auto actual = gradients(y, x);
    const MemoryReport memory = MemoryMeter().measure([&] { gradients(tiled(x), x); });
    int64_t of_weights = 0;
    for (const Tensor& p : parameters) of_weights += static_cast<int64_t>(p.nbytes());
    peaks[wide] = memory.added_peak() - 2 * of_weights;
    CHECK(memory.added_peak() < 4096 * (wide ? 512 : 128) * 4);  // less than one hidden layer

    network->to(torch::kDouble);
    const Tensor x64 = x.detach().to(torch::kDouble).requires_grad_();
    std::vector<Tensor> inputs{x64};
    for (const Tensor& p : network->parameters()) inputs.push_back(p);
    const auto exact = grad({network->forward(x64)}, inputs, {weights.to(torch::kDouble)});
    for (size_t i = 0; i < exact.size(); ++i) {
      CHECK(relative_error(actual[i], exact[i]) < 2 * relative_error(plain[i], exact[i]) + 1e-7);
    }
    CHECK(relative_error(y, network->forward(x64).detach()) < 1e-5);
  }
  CHECK(peaks[1] < 1.5 * peaks[0]);  // four times as wide: only one slice of 64 grows
}

TEST_CASE("hooks of parameters fire once for all slices and see the sum") {
  torch::manual_seed(2);
  torch::nn::Linear layer(8, 8);
  const Tensor x = torch::randn({12, 8}, with_gradient);
  int before = 0, after = 0;
  Tensor seen;
  layer->weight.register_hook([&](const Tensor& g) {
    ++before;
    seen = g.clone();
  });
  struct Counter : torch::autograd::PostAccumulateGradHook {
    int& count;
    explicit Counter(int& c) : count(c) {}
    void operator()(const torch::autograd::Variable&) override { ++count; }
  };
  torch::autograd::impl::set_post_acc_grad_hooks(layer->weight, std::make_unique<Counter>(after));
  tiled_checkpoint([&](const Tensor& t) { return layer(t).tanh(); }, x, 0, 5, layer->parameters()).sum().backward();
  CHECK(before == 1);
  CHECK(after == 1);
  CHECK(torch::equal(seen, layer->weight.grad()));
  const Tensor expected = grad({layer(x).tanh().sum()}, {layer->weight})[0];
  CHECK(torch::allclose(seen, expected, 1e-5, 1e-6));
}

TEST_CASE("random numbers of slices are replayed, and what follows is as if nothing had been recomputed") {
  const Tensor x = torch::randn({10, 6}, with_gradient);
  torch::manual_seed(3);
  const Tensor y = tiled_checkpoint([](const Tensor& t) { return torch::dropout(t, 0.5, true); }, x, 0, 4, {});
  const Tensor drawn = torch::rand({3});
  torch::manual_seed(3);
  std::vector<Tensor> parts;
  for (const Tensor& part : x.detach().split(3)) parts.push_back(torch::dropout(part, 0.5, true));
  CHECK(torch::equal(y, torch::cat(parts)));
  CHECK(torch::equal(drawn, torch::rand({3})));
  torch::manual_seed(8);
  const Tensor next = torch::rand({3});
  torch::manual_seed(8);
  const Tensor gradient = grad({y.sum()}, {x})[0];
  CHECK(torch::equal(torch::rand({3}), next));
  CHECK(torch::equal(gradient != 0, y != 0));
}

TEST_CASE("stages are tiled within each other, each along its own axis") {
  struct Autocast {
    Autocast() { at::autocast::set_autocast_enabled(at::kCPU, true); }
    ~Autocast() {
      at::autocast::clear_cache();
      at::autocast::set_autocast_enabled(at::kCPU, false);
    }
  };
  torch::manual_seed(5);
  torch::nn::Linear first(6, 6), second(6, 6);
  int fired = 0;
  for (const auto& layer : {first, second}) layer->weight.register_hook([&](const Tensor&) { ++fired; });
  const auto stage = [](torch::nn::Linear layer) {
    return [layer](const Tensor& t) mutable {
      return t + torch::dropout(torch::gelu(layer(t)), 0.3, true).to(t.scalar_type());
    };
  };
  const auto along = [](int64_t axis, int64_t count) {
    return [axis, count](const Tensor&) { return headroom::detail::Slices{axis, count}; };
  };
  // [4,7,6] in slices of 2 and 2 along the first dimension, and of these slices of 2, 2, 2 and 1 along the second
  const auto work = std::make_shared<const headroom::detail::TiledWork>(
      std::vector<headroom::detail::TiledStage>{{stage(first), along(0, 2)}, {stage(second), along(1, 4)}});
  std::vector<Tensor> parameters = first->parameters();
  for (const Tensor& p : second->parameters()) parameters.push_back(p);
  const Tensor x = torch::randn({4, 7, 6}, with_gradient), weights = torch::randn_like(x);
  for (const bool autocast : {false, true}) {
    CAPTURE(autocast);
    const auto run = [&](auto&& forward) {
      for (Tensor p : parameters) p.mutable_grad() = Tensor();
      x.mutable_grad() = Tensor();
      torch::manual_seed(6);
      Tensor y;
      {
        std::optional<Autocast> on;
        if (autocast) on.emplace();
        y = forward();
      }
      std::vector<Tensor> results{y.detach(), torch::rand({2})};
      (y * weights).sum().backward();
      results.push_back(torch::rand({2}));
      results.push_back(x.grad());
      for (const Tensor& p : parameters) results.push_back(p.grad());
      return results;
    };
    const auto expected = run([&] {
      std::vector<Tensor> slices;
      for (const Tensor& slice : x.split(2)) {
        const Tensor middle = stage(first)(slice);
        std::vector<Tensor> pieces;
        for (const Tensor& piece : middle.split(2, 1)) pieces.push_back(stage(second)(piece));
        slices.push_back(torch::cat(pieces, 1));
      }
      return torch::cat(slices);
    });
    fired = 0;
    const auto actual = run([&] { return headroom::detail::reentrant_call(work, {x}, parameters)[0]; });
    CHECK(fired == 2);
    for (size_t i = 0; i < 4; ++i) CHECK(torch::equal(actual[i], expected[i]));
    for (size_t i = 4; i < expected.size(); ++i) CHECK(torch::allclose(actual[i], expected[i], 1e-5, 1e-5));
  }
  SECTION("a leaf of the second stage that is not named") {
    parameters.pop_back();
    const Tensor y = headroom::detail::reentrant_call(work, {x}, parameters)[0];
    CHECK(testing::error_of([&] { y.sum().backward(); }).id() == "headroom.checkpoint.captured");
  }
  SECTION("an input without gradient, and a frozen stage") {
    for (const Tensor& p : first->parameters()) p.set_requires_grad(false);
    torch::manual_seed(6);
    const Tensor input = x.detach();
    const Tensor y = headroom::detail::reentrant_call(work, {input}, parameters)[0];
    const auto actual = grad({y.sum()}, second->parameters());
    torch::manual_seed(6);
    std::vector<Tensor> sums(2);
    for (const Tensor& slice : input.split(2)) {
      const Tensor middle = stage(first)(slice);
      for (const Tensor& piece : middle.split(2, 1)) {
        const auto of_piece = grad({stage(second)(piece).sum()}, second->parameters());
        for (size_t i = 0; i < 2; ++i) sums[i] = sums[i].defined() ? sums[i] + of_piece[i] : of_piece[i];
      }
    }
    for (size_t i = 0; i < 2; ++i) CHECK(torch::allclose(actual[i], sums[i], 1e-5, 1e-6));
  }
}

TEST_CASE("bad input of tiled checkpoints") {
  torch::manual_seed(4);
  torch::nn::Linear layer(4, 4);
  const Tensor x = torch::randn({6, 4}, with_gradient);
  const auto forward = [&](const Tensor& t) { return layer(t); };
  const auto id = [](auto&& f) { return testing::error_of(f).id(); };
  SECTION("a captured tensor that needs a gradient") {
    const Tensor y = tiled_checkpoint(forward, x, 0, 2, {layer->weight});
    const Error error = testing::error_of([&] { y.sum().backward(); });
    CHECK(error.id() == "headroom.checkpoint.captured");
    CHECK(testing::contains(error.what(), "a tensor [4]"));
  }
  SECTION("second derivatives") {
    const Tensor y = tiled_checkpoint(forward, x, 0, 2, layer->parameters());
    CHECK(id([&] { grad({y.sum()}, {x}, {}, true, /*create_graph=*/true); }) ==
          "headroom.checkpoint.second_derivative");
  }
  SECTION("another shape, no slices, no such axis") {
    CHECK(id([&] { tiled_checkpoint([](const Tensor& t) { return t.sum(0); }, x, 0, 2, {}); }) ==
          "headroom.checkpoint.tiled.shape");
    CHECK(id([&] { tiled_checkpoint(forward, x, 0, 0, {}); }) == "headroom.checkpoint.tiled.slices");
    CHECK(id([&] { tiled_checkpoint(forward, x, 2, 2, {}); }) == "headroom.checkpoint.tiled.slices");
  }
  SECTION("a parameter or the input changed before backward") {
    const Tensor y = tiled_checkpoint(forward, x, 0, 2, layer->parameters());
    {
      const torch::NoGradGuard no_grad;
      layer->bias.add_(1);
    }
    CHECK(id([&] { y.sum().backward(); }) == "headroom.checkpoint.modified");
    Tensor input = x * 1;
    const Tensor z = tiled_checkpoint(forward, input, 0, 2, layer->parameters());
    input.add_(1);
    CHECK(id([&] { z.sum().backward(); }) == "headroom.checkpoint.modified");
  }
  SECTION("forward changes its slice in place") {
    CHECK(id([&] { tiled_checkpoint([](Tensor t) { return t.mul_(2).exp(); }, x * 1, 0, 2, {}); }) ==
          "headroom.checkpoint.modified");
  }
  SECTION("forward returns a view of its slice") {
    const Tensor y = tiled_checkpoint([](const Tensor& t) { return t.flip(1).view_as(t); }, x, 0, 4, {});
    CHECK(torch::equal(y, x.flip(1)));
    const Tensor g = torch::randn({6, 4});
    CHECK(torch::equal(grad({y}, {x}, {g})[0], g.flip(1)));
    const Tensor same = tiled_checkpoint([](const Tensor& t) { return t; }, x, 0, 4, {});
    CHECK_FALSE(same.is_alias_of(x));
    CHECK(torch::equal(grad({same}, {x}, {g})[0], g));
  }
  SECTION("forward raises in backward: everything is restored, the next backward works") {
    int calls = 0;
    const Tensor y = tiled_checkpoint(
        [&](const Tensor& t) {
          const Tensor h = torch::dropout(t, 0.5, true);
          if (++calls == 4) throw std::runtime_error("no");
          return layer(h);
        },
        x, 0, 2, layer->parameters());
    int fired = 0;
    layer->weight.register_hook([&](const Tensor&) { ++fired; });
    torch::manual_seed(11);
    const Tensor next = torch::rand({2});
    torch::manual_seed(11);
    CHECK_THROWS_WITH(y.sum().backward({}, true), "no");
    CHECK(torch::equal(torch::rand({2}), next));
    CHECK(fired == 0);
    CHECK(SavedTensorHooks::current() == nullptr);
    y.sum().backward();
    CHECK(fired == 1);
  }
  SECTION("without gradients it runs in slices and holds nothing") {
    const auto check = [&] {
      int calls = 0;
      const Tensor y = tiled_checkpoint(
          [&](const Tensor& t) {
            ++calls;
            return layer(t);
          },
          x, 0, 3, layer->parameters());
      CHECK(calls == 3);
      CHECK_FALSE(y.requires_grad());
      CHECK(torch::allclose(y, layer(x).detach()));
    };
    {
      const torch::NoGradGuard no_grad;
      check();
    }
    const c10::InferenceMode inference;
    check();
  }
}

TEST_CASE("a generator that is an input of a checkpoint is replayed, and left alone") {
  const Tensor x = torch::randn({50}, with_gradient);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(7);
  const auto mask = [](const Tensor& t, at::Generator g) { return (t * torch::rand({50}, g)).exp(); };
  const Tensor y = checkpoint(mask, x, generator);
  const auto state = generator.get_state();
  const Tensor actual = grad({y.sum()}, {x})[0];
  CHECK(torch::equal(generator.get_state(), state));
  auto again = at::make_generator<at::CPUGeneratorImpl>(7);
  CHECK(torch::equal(actual, grad({mask(x, again).sum()}, {x})[0]));
  // one that is captured is drawn from again: other numbers, so other gradients
  auto first = generator.clone();
  const Tensor z = checkpoint([&](const Tensor& t) { return mask(t, generator); }, x);
  CHECK_FALSE(torch::equal(grad({z.sum()}, {x})[0], grad({mask(x, first).sum()}, {x})[0]));
}

TEST_CASE("a mismatch names the operators whose results differ") {
  const Tensor x = torch::randn({4, 3}, with_gradient);
  int calls = 0;
  const Tensor y = checkpoint(
      [&](const Tensor& t) {
        return ++calls == 1 ? (t + 1).sin().exp().sum() : (t + 1).slice(0, 0, 2).cos().abs().sum();
      },
      x);
  const Error error = testing::error_of([&] { y.backward(); });
  CHECK(error.id() == "headroom.checkpoint.mismatch");
  CHECK(testing::contains(error.what(), "the result of SliceBackward0 [2, 3]"));
  CHECK(testing::contains(error.what(), "expected the result of AddBackward1 [4, 3]"));
  int again = 0;
  const Tensor z = selective_checkpoint(
      {"aten::sin", "aten::cos"}, [&](const Tensor& t) { return (++again == 1 ? (t + 1).sin() : (t + 1).cos()).exp(); },
      x);
  const Error kept = testing::error_of([&] { z.sum().backward(); });
  CHECK(kept.id() == "headroom.checkpoint.mismatch");
  CHECK(testing::contains(kept.what(), "recomputation calls aten::cos, forward called aten::sin"));
}

TEST_CASE("checkpoints that no disk has room for are errors, not signals") {
  const auto storage = checkpoint_pack(CheckpointStorage::offload);
  const Tensor x = torch::randn({1 << 16});
  for (const char* folder : {"/proc", "/dev/null", "/there is no such folder"}) {
    const Error nowhere = testing::error_of([&] {
      const testing::TemporaryFilesIn there(folder);
      storage(x);
    });
    CHECK(nowhere.id() == "headroom.checkpoint.offload");
    CHECK(testing::contains(nowhere.what(), std::string(folder) + ": "));
    CHECK(testing::contains(nowhere.what(), "TMPDIR"));
  }

  const Tensor leaf = x.clone().requires_grad_();
  const MemoryMeter meter;
  const MemoryReport report = meter.measure([&] {
    const testing::FileSizeLimit limit(1 << 16);
    const std::vector<StackBlock> stack{{{{[](const Tensor& t) { return t.exp(); }, {}, {}}}}};
    const Error full = testing::error_of([&] { run_stack(stack, leaf * 1, "full+offload"); });
    CHECK(full.id() == "headroom.checkpoint.offload");
    CHECK(testing::contains(full.what(), "262144 bytes"));
  });
  CHECK(report.held() == 0);
}

TEST_CASE("a reversible stack has the gradients of its definition, and memory that does not depend on its depth") {
  torch::manual_seed(5);
  const auto layers_of = [](std::vector<torch::nn::Linear>& modules) {
    std::vector<ReversibleLayer> layers;
    for (size_t i = 0; i + 1 < modules.size(); i += 2) {
      const auto branch = [](torch::nn::Linear m) {
        return ReversibleLayer::Branch{[m](const Tensor& t) mutable { return torch::dropout(m(t).tanh(), 0.2, true); },
                                       m->parameters()};
      };
      layers.push_back({branch(modules[i]), branch(modules[i + 1])});
    }
    return layers;
  };
  const auto parameters_of = [](const std::vector<torch::nn::Linear>& modules) {
    std::vector<Tensor> all;
    for (const auto& m : modules) {
      for (const Tensor& p : m->parameters()) all.push_back(p);
    }
    return all;
  };
  std::vector<torch::nn::Linear> modules;
  for (int i = 0; i < 10; ++i) modules.emplace_back(torch::nn::Linear(12, 12));
  for (auto& m : modules) m->to(torch::kDouble);
  const Tensor a = torch::randn({40, 12}, with_gradient.dtype(torch::kDouble)),
               b = torch::randn({40, 12}, with_gradient.dtype(torch::kDouble));
  const auto layers = layers_of(modules);
  const auto gradients = [&](auto&& run) {
    torch::manual_seed(6);
    const auto [y1, y2] = run();
    std::vector<Tensor> inputs = parameters_of(modules);
    inputs.insert(inputs.end(), {a, b});
    auto all = grad({(y1.sin() + y2.pow(2)).sum()}, inputs);
    all.insert(all.end(), {y1, y2, torch::rand({2})});
    return all;
  };
  const auto expected = gradients([&] {
    Tensor y1 = a, y2 = b;
    for (const auto& layer : layers) {
      y1 = y1 + layer.first.forward(y2);
      y2 = y2 + layer.second.forward(y1);
    }
    return std::pair(y1, y2);
  });
  const auto actual = gradients([&] { return run_reversible(layers, a, b); });
  for (size_t i = 0; i < expected.size(); ++i) CHECK(torch::allclose(actual[i], expected[i], 1e-10, 1e-12));

  int fired = 0;
  modules[3]->weight.register_hook([&](const Tensor&) { ++fired; });
  const auto [y1, y2] = run_reversible(layers, a, b);
  (y1 + y2).sum().backward();
  CHECK(fired == 1);
  CHECK(testing::error_of([&] {
          auto missing = layers;
          missing[2].second.parameters.pop_back();
          const auto [u, v] = run_reversible(missing, a, b);
          (u + v).sum().backward();
        }).id() == "headroom.checkpoint.captured");
}

TEST_CASE("a reversible encoder") {
  torch::manual_seed(7);
  nn::EncoderOptions options(16, 2, {40}, 4);
  options.reversible(true);
  nn::Encoder encoder(options);
  const Tensor x = torch::randn({3, 20, 16});
  const auto run = [&](const Tensor& given, bool by_definition) {
    encoder->zero_grad();
    const Tensor input = given.detach().requires_grad_();
    Tensor y;
    if (by_definition) {
      Tensor y1 = input, y2 = input;
      for (const auto& layer : *encoder->layers) {
        const auto& block = dynamic_cast<nn::EncoderBlock::ContainedType&>(*layer);
        auto attention = block.attention;
        auto feed_forward = block.feed_forward;
        auto first_norm = block.attention_norm, second_norm = block.feed_forward_norm;
        y1 = y1 + attention->forward(first_norm->forward(y2));
        y2 = y2 + feed_forward->forward(second_norm->forward(y1));
      }
      y = (y1 + y2) * 0.5;
    } else {
      y = encoder->forward(input);
    }
    y.pow(2).sum().backward();
    std::vector<Tensor> all{y.detach(), input.grad()};
    for (const Tensor& p : encoder->parameters()) all.push_back(p.grad().clone());
    return all;
  };
  const auto actual = run(x, false);
  encoder->to(torch::kDouble);
  const auto exact = run(x.to(torch::kDouble), true);
  for (size_t i = 0; i < exact.size(); ++i) CHECK(relative_error(actual[i], exact[i]) < 1e-5);

  const auto activations = [](int64_t layers, bool reversible) {
    nn::EncoderOptions deep(32, 2, {64}, layers);
    deep.reversible(reversible);
    const auto step = [&](bool encode) {
      nn::Encoder e(deep);
      for (const Tensor& p : e->parameters()) p.mutable_grad() = torch::zeros_like(p);
      const Tensor tokens = torch::randn({2, 100, 32});
      if (encode) e->forward(tokens).sum().backward();
    };
    return plan([&] { step(true); }, this_machine()).peak_bytes - plan([&] { step(false); }, this_machine()).peak_bytes;
  };
  // Each layer adds the gradients of its weights, which backward returns together, and its rotary table
  const int64_t weights = 4 * (32 * 96 + 32 * 32 + 2 * 32 * 64 + 64 + 32 + 2 * 32), table = 100 * 8 * 8;
  CHECK(activations(12, true) - activations(6, true) == 6 * (weights + table));
  CHECK(activations(12, false) - activations(6, false) > 6 * (2 * 100 * 32 * 4) * 8);

  nn::Encoder both(nn::EncoderOptions(options).gradient_checkpointing(true));
  CHECK(testing::error_of([&] { both->forward(x); }).id() == "headroom.nn.encoder.reversible");
}
