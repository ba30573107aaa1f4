#include "headroom/nn/linear.hpp"

#include <torch/nn/modules/linear.h>

#include "headroom/checkpoint.hpp"
#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

double rms(const Tensor& x) { return x.to(torch::kDouble).square().mean().sqrt().item<double>(); }

std::vector<Tensor> leaves(const std::vector<Tensor>& tensors, torch::ScalarType type) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(t.detach().to(type, false, /*copy=*/true).requires_grad_());
  return result;
}
std::vector<Tensor> leaves(const std::vector<Tensor>& tensors) { return leaves(tensors, tensors[0].scalar_type()); }
std::vector<Tensor> to_double(const std::vector<Tensor>& tensors) { return leaves(tensors, torch::kDouble); }

/// The output of f on copies of the inputs and the gradients, after grad_output, with respect to each.
template <class F>
std::vector<Tensor> values_and_gradients(F&& f, const std::vector<Tensor>& inputs, const Tensor& grad_output) {
  const Tensor output = f(inputs);
  std::vector<Tensor> all = torch::autograd::grad({output}, inputs, {grad_output.to(output.scalar_type())});
  all.insert(all.begin(), output.detach());
  return all;
}

/// A norm and a feed-forward network as one chain, with the parameters x, norm weight, weights, biases.
Tensor fused(const std::vector<Tensor>& t) {
  const size_t layers = (t.size() - 2) / 2;
  return nn::detail::run({.x = t[0],
                          .residual = t[0],
                          .norm_weight = t[1],
                          .eps = 1e-6,
                          .weights = {t.begin() + 2, t.begin() + 2 + layers},
                          .biases = {t.begin() + 2 + layers, t.end()}});
}
/// The same as a checkpoint of its x.
Tensor checkpointed(const std::vector<Tensor>& t) {
  return checkpoint(
      [t](const Tensor& x) {
        auto all = t;
        all[0] = x;
        return fused(all);
      },
      t[0]);
}
Tensor by_operators(const std::vector<Tensor>& t) {
  const size_t layers = (t.size() - 2) / 2;
  Tensor x = torch::rms_norm(t[0], {t[0].size(-1)}, t[1], 1e-6);
  for (size_t i = 0; i < layers; ++i) x = torch::linear(i > 0 ? torch::gelu(x) : x, t[2 + i], t[2 + layers + i]);
  return t[0] + x;
}
std::vector<Tensor> chain_parameters(int64_t rows, const std::vector<int64_t>& widths) {
  std::vector<Tensor> t = {torch::randn({rows, widths.front()}), torch::rand({widths.front()}) + 0.5};
  for (size_t i = 1; i < widths.size(); ++i) {
    t.push_back(torch::randn({widths[i], widths[i - 1]}) / std::sqrt(static_cast<double>(widths[i - 1])));
  }
  for (size_t i = 1; i < widths.size(); ++i) t.push_back(torch::randn({widths[i]}));
  return t;
}

}  // namespace

TEST_CASE("the register tile multiplies any shape and strides, on top of what is there") {
  torch::manual_seed(1);
  for (const int64_t m : {1, 7, 8, 65, 200}) {
    for (const int64_t k : {1, 5, 256, 300}) {
      for (const int64_t n : {1, 16, 31, 48, 50, 99}) {
        CAPTURE(m, k, n);
        const Tensor a = torch::randn({m, k}), at = torch::randn({k, m}).t(), b = torch::randn({k, n}),
                     bt = torch::randn({n, k}).t(), bias = torch::randn({n}), before = torch::randn({m, n});
        for (const auto& [left, right] : {std::pair{a, b}, {at, b}, {a, bt}, {at, bt}}) {
          const Tensor product = left.to(torch::kDouble).mm(right.to(torch::kDouble));
          const auto error = [&](nn::detail::AddTo start, const Tensor& expected) {
            const Tensor c = before.clone();
            nn::detail::PackedB operand(right);
            nn::detail::multiply_tiled(left, operand, c, start, bias);
            return (c - expected).abs().max().item<double>();
          };
          const double bound = 1e-6 * std::sqrt(static_cast<double>(k)) * 10;
          CHECK(error(nn::detail::AddTo::nothing, product) < bound);
          CHECK(error(nn::detail::AddTo::bias, product + bias) < bound);
          CHECK(error(nn::detail::AddTo::c, product + before) < bound);
        }
      }
    }
  }
}

TEST_CASE("the register tile gives the same bits for any number of threads") {
  const Tensor a = torch::randn({300, 513}), b = torch::randn({513, 70});
  const auto product = [&](int threads) {
    torch::set_num_threads(threads);
    const Tensor c = torch::empty({300, 70});
    nn::detail::PackedB operand(b);
    nn::detail::multiply_tiled(a, operand, c, nn::detail::AddTo::nothing, {});
    return c;
  };
  const int threads = torch::get_num_threads();
  const Tensor one = product(1);
  CHECK(one.equal(product(2)));
  CHECK(one.equal(product(3)));
  torch::set_num_threads(threads);
}

TEST_CASE("nn::linear is as close to double as torch::linear, in values and gradients, for any rank") {
  torch::manual_seed(2);
  for (const auto& shape : std::vector<std::vector<int64_t>>{{64}, {1000, 64}, {3, 700, 40}, {2, 5, 300, 96}}) {
    for (const bool has_bias : {true, false}) {
      for (const int64_t out : {1, 30, 96, 200}) {
        CAPTURE(shape, has_bias, out);
        std::vector<Tensor> inputs = {torch::randn(shape), torch::randn({out, shape.back()})};
        if (has_bias) inputs.push_back(torch::randn({out}));
        std::vector<int64_t> output_shape = shape;
        output_shape.back() = out;
        const Tensor grad = torch::randn(output_shape);
        const auto bias = [](const std::vector<Tensor>& t) {
          return t.size() > 2 ? std::optional(t[2]) : std::nullopt;
        };
        const auto theirs = [&](const std::vector<Tensor>& t) {
          return torch::linear(t[0], t[1], bias(t).value_or(Tensor()));
        };
        const auto exact = values_and_gradients(theirs, to_double(inputs), grad);
        const auto torch_values = values_and_gradients(theirs, leaves(inputs), grad);
        const auto ours = values_and_gradients(
            [&](const std::vector<Tensor>& t) { return nn::linear(t[0], t[1], bias(t)); }, leaves(inputs), grad);
        for (size_t i = 0; i < ours.size(); ++i) {
          CAPTURE(i);
          REQUIRE(ours[i].sizes() == exact[i].sizes());
          CHECK(rms(ours[i] - exact[i]) <= 2 * rms(torch_values[i] - exact[i]) + 1e-7 * rms(exact[i]));
        }
      }
    }
  }
}

TEST_CASE("norm, layers, GELU and residual in one function are as close to double as one operator after the other") {
  torch::manual_seed(3);
  for (const auto& widths :
       std::vector<std::vector<int64_t>>{{24, 24}, {32, 64, 32}, {48, 100, 20, 48}, {16, 24, 40, 72, 16}}) {
    for (const int64_t rows : {1, 77, 20000}) {  // the last one takes several chunks
      CAPTURE(widths, rows);
      const auto inputs = chain_parameters(rows, widths);
      const Tensor grad = torch::randn({rows, widths.back()});
      const auto exact = values_and_gradients(by_operators, to_double(inputs), grad);
      const auto theirs = values_and_gradients(by_operators, leaves(inputs), grad);
      const auto ours = values_and_gradients(fused, leaves(inputs), grad);
      for (size_t i = 0; i < ours.size(); ++i) {
        CAPTURE(i);
        CHECK(rms(ours[i] - exact[i]) <= 2 * rms(theirs[i] - exact[i]) + 1e-7 * rms(exact[i]));
      }
      const auto again = values_and_gradients(fused, leaves(inputs), grad);
      for (size_t i = 0; i < ours.size(); ++i) CHECK(ours[i].equal(again[i]));
    }
  }
}

TEST_CASE("second derivatives of the chain are those of the operators") {
  torch::manual_seed(4);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  const auto inputs = chain_parameters(9, {6, 10, 6});
  const auto second = [&](auto&& f) {
    const auto t = leaves(inputs, type);
    const auto first = torch::autograd::grad({f(t).sin().sum()}, t, {}, true, true);
    Tensor sum = torch::zeros({});
    for (const Tensor& g : first) sum = sum + g.square().sum();
    return torch::autograd::grad({sum}, t);
  };
  const auto ours = second(fused), theirs = second(by_operators);
  const double relative = type == torch::kFloat ? 1e-3 : 1e-11;
  for (size_t i = 0; i < ours.size(); ++i) {
    CHECK((ours[i] - theirs[i]).abs().max().item<double>() < relative * theirs[i].abs().max().item<double>());
  }
}

TEST_CASE("only wanted gradients are computed, and without any the input of GELU is not kept") {
  torch::manual_seed(5);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  const auto size = static_cast<int64_t>(c10::elementSize(type));
  auto t = chain_parameters(500, {16, 32, 16});
  for (Tensor& x : t) x = x.to(type);
  for (size_t wanted = 0; wanted < t.size(); ++wanted) {
    auto inputs = t;
    inputs[wanted] = inputs[wanted].clone().requires_grad_();
    const auto gradient = [&](auto&& f) { return torch::autograd::grad({f(inputs).sum()}, {inputs[wanted]})[0]; };
    CHECK(gradient(fused).allclose(gradient(by_operators), 1e-4, 1e-4));
  }
  CHECK_FALSE(fused(t).requires_grad());
  t[0].requires_grad_();
  const torch::NoGradGuard guard;
  CHECK_FALSE(fused(t).requires_grad());
  MemoryMeter meter;
  Tensor output;
  const int64_t rows = 100000;
  t[0] = torch::randn({rows, 16}, type);
  // At most the result and the widest layer; operators hold two tensors while they make one of the other
  const int64_t held_at_once = type == torch::kFloat ? rows * (16 + 32) * size - 1 : rows * (16 + 32) * size;
  CHECK(meter.measure([&] { output = fused(t); }).added_peak() <= held_at_once);
  CHECK(meter.measure([&] { output = fused(t); }).held() == 0);
}

TEST_CASE("a residual that is another tensor gets the gradient of the sum") {
  torch::manual_seed(6);
  const auto inputs =
      leaves({torch::randn({4, 30, 8}), torch::randn({30, 4, 12}).transpose(0, 1), torch::randn({12, 8})});
  const Tensor grad = torch::randn({4, 30, 12});
  const auto ours = values_and_gradients(
      [](const auto& t) { return nn::detail::run({.x = t[0], .residual = t[1], .weights = {t[2]}}); }, inputs, grad);
  const auto theirs =
      values_and_gradients([](const auto& t) { return torch::linear(t[0], t[2]) + t[1]; }, inputs, grad);
  for (size_t i = 0; i < ours.size(); ++i) CHECK(ours[i].allclose(theirs[i], 1e-5, 1e-5));
}

TEST_CASE("nn::linear reads strided, expanded and empty inputs, other dtypes and devices") {
  torch::manual_seed(7);
  const Tensor w = torch::randn({20, 24}), b = torch::randn({20});
  const auto agrees = [&](const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const Tensor ours = nn::linear(x, weight, bias), theirs = torch::linear(x, weight, bias);
    return ours.scalar_type() == theirs.scalar_type() && ours.sizes() == theirs.sizes() &&
           (ours.numel() == 0 || ours.allclose(theirs, 1e-5, 1e-5));
  };
  CHECK(agrees(torch::randn({24, 300}).t(), w, b));
  CHECK(agrees(torch::randn({1, 24}).expand({50, 24}), w, b));
  CHECK(agrees(torch::randn({6, 48, 10}).transpose(1, 2).slice(-1, 0, 48, 2), torch::randn({24, 20}).t(), b));
  CHECK(agrees(torch::randn({0, 24}), w, b));
  CHECK(agrees(torch::randn({3, 0, 24}), w, b));
  CHECK(agrees(torch::randn({5, 24}, torch::kDouble), w.to(torch::kDouble), b.to(torch::kDouble)));
  CHECK(agrees(torch::randn({5, 24}).to(torch::kBFloat16), w.to(torch::kBFloat16), b.to(torch::kBFloat16)));
  const auto meta = [](const Tensor& t) { return torch::empty(t.sizes(), torch::kMeta); };
  CHECK(nn::linear(meta(torch::randn({5, 24})), meta(w), meta(b)).sizes() == at::IntArrayRef({5, 20}));
  CHECK(testing::error_of([&] { nn::linear(torch::randn({5, 23}), w, b); }).id() == "headroom.nn.linear.shape");
  CHECK(testing::error_of([&] { nn::linear(torch::randn({5, 24}), w, w); }).id() == "headroom.nn.linear.shape");
}

TEST_CASE("nn::Linear has torch::nn::Linear's parameters and initial values") {
  for (const bool bias : {true, false}) {
    const auto options = torch::nn::LinearOptions(12, 7).bias(bias);
    torch::manual_seed(8);
    nn::Linear ours(options);
    torch::manual_seed(8);
    torch::nn::Linear theirs(options);
    REQUIRE(ours->named_parameters().keys() == theirs->named_parameters().keys());
    for (const auto& p : theirs->named_parameters()) CHECK(ours->named_parameters()[p.key()].equal(p.value()));
    const auto copy = std::dynamic_pointer_cast<nn::LinearImpl>(ours->clone());
    const Tensor x = torch::randn({4, 12});
    CHECK(copy->forward(x).equal(ours->forward(x)));
  }
}

TEST_CASE(
    "a block holds the input of each part, q, k, v, the heads, and the inputs of GELU; plain operators hold more") {
  torch::manual_seed(9);
  nn::EncoderOptions options(32, 2, {64, 48}, 1);
  nn::EncoderBlock block = options.block();
  const Tensor x = torch::randn({1, 40, 100, 32}).requires_grad_();
  block->forward(x, 1);  // rotary table, products measured
  MemoryMeter meter;
  Tensor output;
  const int64_t tokens = 40 * 100, lse = tokens * 2 * 8;
  const auto held = meter.measure([&] { output = block->forward(x, 1); }).held();
  // q,k,v, heads, sum after attention, two inputs of GELU, output
  CHECK(held == 4 * tokens * (3 * 32 + 32 + 32 + 64 + 48 + 32) + lse);

  const auto t = leaves(chain_parameters(20000, {32, 64, 64, 32}));
  const auto peak = [&](auto&& f) {
    torch::autograd::grad({f(t).sum()}, t);
    return meter.measure([&] { torch::autograd::grad({f(t).sum()}, t); }).added_peak();
  };
  CHECK(peak(fused) < 0.6 * static_cast<double>(peak(by_operators)));
}

TEST_CASE("checkpointing the chain changes no bit") {
  torch::manual_seed(10);
  const auto inputs = chain_parameters(3000, {32, 64, 32});
  const Tensor grad = torch::randn({3000, 32});
  const auto plain = values_and_gradients(fused, leaves(inputs), grad);
  const auto recomputed = values_and_gradients(checkpointed, leaves(inputs), grad);
  for (size_t i = 0; i < plain.size(); ++i) CHECK(plain[i].equal(recomputed[i]));
}

namespace {

/// Bytes that are held between forward and backward.
template <class F>
int64_t held(F&& f) {
  Tensor output;
  return MemoryMeter().measure([&] { output = f(); }).held();
}

headroom::detail::AutocastGuard in_bfloat16() { return {torch::kCPU, torch::kBFloat16}; }

}  // namespace

TEST_CASE("off the fast path the chain gives the operators' values and gradients, and holds the inputs of GELU alone") {
  torch::manual_seed(12);
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16, torch::kHalf);
  for (const auto& widths :
       std::vector<std::vector<int64_t>>{{24, 24}, {32, 64, 32}, {48, 100, 20, 48}, {16, 24, 40, 72, 16}}) {
    CAPTURE(type, widths);
    const int64_t rows = 500, size = static_cast<int64_t>(c10::elementSize(type));
    const auto inputs = leaves(chain_parameters(rows, widths), type);
    const Tensor grad = torch::randn({rows, widths.back()}).to(type);
    const auto exact = values_and_gradients(by_operators, to_double(inputs), grad);
    const auto theirs = values_and_gradients(by_operators, inputs, grad);
    const auto ours = values_and_gradients(fused, inputs, grad);
    for (size_t i = 0; i < ours.size(); ++i) {
      CAPTURE(i);
      CHECK(ours[i].scalar_type() == type);
      CHECK(rms(ours[i] - exact[i]) <= 1.5 * rms(theirs[i] - exact[i]) + 1e-15 * rms(exact[i]));
    }
    int64_t features = widths.back();
    for (size_t i = 1; i + 1 < widths.size(); ++i) features += widths[i];
    CHECK(held([&] { return fused(inputs); }) == rows * features * size);
    CHECK(held([&] { return by_operators(inputs); }) > rows * features * size);
  }
}

TEST_CASE("central differences are the chain's gradients in double") {
  torch::manual_seed(13);
  const auto inputs = leaves(chain_parameters(5, {4, 7, 3, 4}), torch::kDouble);
  const auto loss = [](const std::vector<Tensor>& t) { return fused(t).sin().sum(); };
  const auto gradients = torch::autograd::grad({loss(inputs)}, inputs);
  const torch::NoGradGuard guard;
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (int64_t j = 0; j < inputs[i].numel(); ++j) {
      const Tensor element = inputs[i].view(-1)[j];
      const auto moved = [&](double by) {
        element.add_(by);
        const double value = loss(inputs).item<double>();
        element.sub_(by);
        return value;
      };
      const double difference = (moved(kStep) - moved(-kStep)) / (2 * kStep);
      CHECK(gradients[i].view(-1)[j].item<double>() == Approx(difference).epsilon(1e-7).margin(1e-8));
    }
  }
}

TEST_CASE("under autocast the chain computes in the narrow type, holds it, and gives gradients in the parameters'") {
  torch::manual_seed(14);
  const int64_t rows = 800;
  const auto inputs = chain_parameters(rows, {32, 64, 48, 32});
  const Tensor grad = torch::randn({rows, 32});
  const auto exact = values_and_gradients(by_operators, to_double(inputs), grad);
  const auto run = [&](auto&& f, bool backward_within) {
    const auto t = leaves(inputs);
    std::optional<headroom::detail::AutocastGuard> autocast(std::in_place, torch::kCPU, torch::kBFloat16);
    const Tensor output = f(t);
    if (!backward_within) autocast.reset();
    auto all = torch::autograd::grad({output}, t, {grad});
    all.insert(all.begin(), output.detach());
    return all;
  };
  const auto theirs = run(by_operators, false);
  for (const bool backward_within : {false, true}) {
    const auto ours = run(fused, backward_within);
    for (size_t i = 0; i < ours.size(); ++i) {
      CAPTURE(i, backward_within);
      CHECK(ours[i].scalar_type() == torch::kFloat);
      CHECK(rms(ours[i] - exact[i]) <= 1.5 * rms(theirs[i] - exact[i]));
      CHECK(rms(ours[i] - exact[i]) > 1e-4 * rms(exact[i]));
    }
  }
  const auto t = leaves(inputs);
  const auto autocast = in_bfloat16();
  CHECK(held([&] { return fused(t); }) == rows * ((64 + 48) * 2 + 32 * 4));
  // The casts made inside have no graph, and are not in autocast's cache for others
  CHECK(torch::linear(t[0], t[2]).sum().requires_grad());
  CHECK(torch::autograd::grad({torch::linear(t[0].detach(), t[2]).sum()}, {t[2]})[0].defined());
}

TEST_CASE(
    "without a norm the cast input is what the chain holds under autocast, and a lone linear lets autocast cache") {
  torch::manual_seed(15);
  const int64_t rows = 300;
  nn::FeedForward network(nn::FeedForwardOptions(16, {40}));
  nn::Linear linear(16, 24);
  const Tensor x = torch::randn({rows, 16});
  const auto autocast = in_bfloat16();
  CHECK(held([&] { return network->forward(x); }) == rows * (16 + 40 + 16) * 2);
  linear->forward(x);
  CHECK(held([&] { return linear->forward(x); }) == rows * (16 + 24) * 2);
}

TEST_CASE("off the fast path, too, checkpointing the chain changes no bit") {
  torch::manual_seed(16);
  const auto type = GENERATE(torch::kDouble, torch::kBFloat16);
  const auto inputs = leaves(chain_parameters(300, {32, 64, 32}), type);
  const Tensor grad = torch::randn({300, 32}).to(type);
  for (const bool autocast : {false, true}) {
    std::optional<headroom::detail::AutocastGuard> region;
    if (autocast) region.emplace(torch::kCPU, torch::kBFloat16);
    const auto plain = values_and_gradients(fused, leaves(inputs), grad);
    const auto recomputed = values_and_gradients(checkpointed, leaves(inputs), grad);
    for (size_t i = 0; i < plain.size(); ++i) CHECK(plain[i].equal(recomputed[i]));
  }
}

TEST_CASE("a block holds the same tensors in any dtype, under autocast too, and by any backend that stores no scores") {
  torch::manual_seed(17);
  const auto options = [](AttentionBackend backend) {
    nn::EncoderOptions block(32, 2, {64, 48}, 1);
    block.attention(nn::SelfAttentionOptions(32, 2).request(AttentionOptions().backend(backend)));
    return block;
  };
  const int64_t tokens = 10 * 30, lse = tokens * 2 * 8;
  for (const auto backend : {AttentionBackend::tiled, AttentionBackend::chunked}) {
    for (const auto type : {torch::kDouble, torch::kBFloat16}) {
      CAPTURE(backend, type);
      nn::EncoderBlock block = options(backend).block();
      block->to(type);
      const Tensor x = torch::randn({1, 10, 30, 32}, type).requires_grad_();
      block->forward(x, 1);  // rotary table
      // q,k,v, heads, sum after attention, two inputs of GELU, output
      const int64_t expected =
          tokens * (3 * 32 + 32 + 32 + 64 + 48 + 32) * static_cast<int64_t>(c10::elementSize(type));
      CHECK(held([&] { return block->forward(x, 1); }) == expected + lse);
    }
    nn::EncoderBlock block = options(backend).block();
    const Tensor x = torch::randn({1, 10, 30, 32}).requires_grad_();
    const auto autocast = in_bfloat16();
    block->forward(x, 1);  // rotary table, cast of the lone projection's weight
    CHECK(held([&] { return block->forward(x, 1); }) == tokens * ((3 * 32 + 32 + 64 + 48) * 2 + (32 + 32) * 4) + lse);
  }
}
