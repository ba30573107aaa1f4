#include <torch/torch.h>

#include "headroom/memory.hpp"
#include "headroom/nn/linear_self_attention.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::largest_difference;
using torch::Tensor;

namespace {

/// The published formula, [..., H, L, D], with everything stored.
Tensor by_formula(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& log_temperature = {}) {
  const auto normed = [](const Tensor& x) { return x / x.norm(2, {-2}, /*keepdim=*/true); };
  Tensor scores = torch::einsum("...ld,...le->...de", {normed(q), normed(k)}) * scale;
  if (log_temperature.defined()) scores = scores * log_temperature.exp().view({-1, 1, 1});
  return torch::einsum("...de,...le->...ld", {scores.softmax(-1), v});
}

/// The module's formula along dimension `axis`.
Tensor by_formula(const nn::LinearSelfAttention& module, const Tensor& x, int64_t axis) {
  const auto parameters = module->named_parameters();
  const Tensor normed = x / x.norm(2, {-1}, true) * std::sqrt(x.size(-1)) * parameters["norm.gamma"];
  const auto parts = torch::matmul(normed, parameters["to_qkv.0.weight"].t()).chunk(3, -1);
  const auto heads = [&](const Tensor& part) {
    return part.unflatten(-1, {module->options.heads(), -1}).movedim(axis, -2);
  };
  const Tensor attended = by_formula(heads(parts[0]), heads(parts[1]), heads(parts[2]), module->options.scale(),
                                     parameters["temperature"].flatten());
  return torch::matmul(attended.movedim(-2, axis).flatten(-2), parameters["to_out.1.weight"].t());
}

Tensor noise_like(const Tensor& x) {
  return torch::cos(torch::arange(x.numel(), torch::kDouble) * 1.7).view(x.sizes()).to(x.scalar_type());
}

std::vector<Tensor> with_gradients(const Tensor& output, const std::vector<Tensor>& leaves) {
  auto results = torch::autograd::grad({(output * noise_like(output)).sum()}, leaves);
  results.push_back(output.detach());
  return results;
}

/// At most twice (RMS) and four times (largest) the errors of the plain computation in the same dtype.
void check_accuracy(const std::vector<Tensor>& ours, const std::vector<Tensor>& plain,
                    const std::vector<Tensor>& exact) {
  const auto errors = [&](const std::vector<Tensor>& values) {
    std::vector<Tensor> all;
    for (size_t i = 0; i < exact.size(); ++i) {
      all.push_back((values[i] - exact[i]).flatten() / exact[i].square().mean().sqrt());
    }
    return torch::cat(all);
  };
  const Tensor our_error = errors(ours), plain_error = errors(plain);
  CHECK(our_error.square().mean().item<double>() <= 4 * plain_error.square().mean().item<double>());
  CHECK(our_error.abs().max().item<double>() <= 4 * plain_error.abs().max().item<double>());
}

}  // namespace

TEST_CASE("linear attention is its formula in values, gradients and second gradients") {
  torch::manual_seed(21);
  for (const auto& shape :
       {std::vector<int64_t>{3, 11, 4}, {2, 3, 11, 4}, {7, 2, 5, 6}, {2, 3, 4, 9, 5}, {1, 1, 1, 1}}) {
    for (const bool permuted : {false, true}) {
      const auto make = [&] {
        const Tensor x = torch::randn(shape, torch::kDouble);
        return (permuted ? x.transpose(-3, -2).contiguous().transpose(-3, -2) : x).requires_grad_();
      };
      const Tensor q = make(), k = make(), v = make();
      const Tensor temperature = torch::randn({shape.end()[-3]}, torch::kDouble).requires_grad_();
      const auto derivatives = [&](const Tensor& output) {
        auto first = torch::autograd::grad({(output * noise_like(output)).sum()}, {q, k, v, temperature}, {}, true,
                                           /*create_graph=*/true);
        Tensor mixed = output.square().sum();
        for (const Tensor& x : first) mixed = mixed + x.sin().sum();
        for (const Tensor& x : torch::autograd::grad({mixed}, {q, k, v, temperature})) first.push_back(x);
        first.push_back(output);
        return first;
      };
      const auto ours =
          derivatives(linear_attention(q, k, v, LinearAttentionOptions().scale(3).log_temperature(temperature)));
      const auto expected = derivatives(by_formula(q, k, v, 3, temperature));
      for (size_t i = 0; i < ours.size(); ++i) {
        CAPTURE(shape, permuted, i);
        CHECK(largest_difference(ours[i], expected[i]) < 1e-10);
      }
    }
  }
}

TEST_CASE("linear attention in float is as close to double as its formula in float") {
  torch::manual_seed(22);
  const auto run = [&](const std::vector<Tensor>& inputs, torch::ScalarType type, auto&& function) {
    std::vector<Tensor> leaves;
    for (const Tensor& x : inputs) leaves.push_back(x.detach().to(type).requires_grad_());
    return with_gradients(function(leaves), leaves);
  };
  for (const int64_t length : {40, 3000}) {
    std::vector<Tensor> inputs;
    for (int i = 0; i < 3; ++i) inputs.push_back(torch::randn({2, 4, length, 16}));
    inputs.push_back(torch::randn({4}));
    const auto formula = [](const std::vector<Tensor>& x) { return by_formula(x[0], x[1], x[2], 8, x[3]); };
    const auto ours = run(inputs, torch::kFloat, [](const std::vector<Tensor>& x) {
      return linear_attention(x[0], x[1], x[2], LinearAttentionOptions().log_temperature(x[3]));
    });
    check_accuracy(ours, run(inputs, torch::kFloat, formula), run(inputs, torch::kDouble, formula));
  }
}

TEST_CASE("linear attention computes bfloat16 in float, and takes zeros and nothing") {
  torch::manual_seed(23);
  const Tensor q = torch::randn({2, 3, 50, 8}, torch::kBFloat16), k = torch::randn_like(q), v = torch::randn_like(q);
  const Tensor output = linear_attention(q, k, v);
  CHECK(output.scalar_type() == torch::kBFloat16);
  CHECK(torch::equal(
      output, linear_attention(q.to(torch::kFloat), k.to(torch::kFloat), v.to(torch::kFloat)).to(torch::kBFloat16)));
  const Tensor zeros = torch::zeros({1, 2, 5, 4}).requires_grad_(), values = torch::randn({1, 2, 5, 4});
  const Tensor mean = linear_attention(zeros, zeros, values);  // all weights are equal
  CHECK(mean.allclose(values.mean(-1, true).expand_as(values)));
  CHECK(torch::autograd::grad({mean.sum()}, {zeros})[0].isfinite().all().item<bool>());
  CHECK(linear_attention(torch::randn({0, 2, 5, 4}), torch::randn({0, 2, 5, 4}), torch::randn({0, 2, 5, 4})).numel() ==
        0);
  CHECK(linear_attention(torch::randn({3, 2, 0, 4}), torch::randn({3, 2, 0, 4}), torch::randn({3, 2, 0, 4})).numel() ==
        0);
}

TEST_CASE("dropout of linear attention is the same in the backward pass and right on average") {
  torch::manual_seed(24);
  const int64_t draws = 4000;
  const Tensor q = torch::randn({1, 2, 6, 5}).expand({draws, 2, 6, 5}), v = torch::randn({1, 2, 6, 5}).expand_as(q);
  const auto forward = [&](const Tensor& values, int seed) {
    torch::manual_seed(seed);
    return linear_attention(q, q, values, LinearAttentionOptions().dropout(0.4));
  };
  const Tensor leaf = v.contiguous().requires_grad_();
  const Tensor dropped = forward(leaf, 1), whole = linear_attention(q, q, v);
  CHECK(torch::equal(dropped, forward(v, 1)));
  CHECK_FALSE(torch::equal(dropped, forward(v, 2)));
  const Tensor deviation = (dropped.mean(0) - whole[0]) / (dropped.std(0) / std::sqrt(draws));
  CHECK(deviation.abs().max().item<float>() < 5);
  // Output is linear in v: <gradient, v> is <grad, output>, if both passes drop the same weights
  const Tensor grad = torch::randn_like(dropped);
  const Tensor grad_v = torch::autograd::grad({dropped}, {leaf}, {grad})[0];
  CHECK((grad_v * leaf).sum({1, 2, 3}).allclose((grad * dropped).sum({1, 2, 3}), 1e-3, 1e-4));
}

TEST_CASE("LinearAttention has the parameters of BS-RoFormer's and is its formula along any axis") {
  torch::manual_seed(25);
  nn::LinearSelfAttention module(nn::LinearSelfAttentionOptions(12, 3).head_dim(5));
  std::vector<std::string> names;
  for (const auto& entry : module->named_parameters()) names.push_back(entry.key());
  std::sort(names.begin(), names.end());
  CHECK(names == std::vector<std::string>{"norm.gamma", "temperature", "to_out.1.weight", "to_qkv.0.weight"});
  CHECK(module->named_parameters()["to_qkv.0.weight"].sizes() == at::IntArrayRef({45, 12}));
  CHECK(module->named_parameters()["to_out.1.weight"].sizes() == at::IntArrayRef({12, 15}));
  CHECK(torch::equal(module->temperature, torch::ones({3, 1, 1})));
  torch::nn::init::normal_(module->temperature), torch::nn::init::normal_(module->norm->weight);
  const Tensor x = torch::randn({2, 9, 7, 12});
  for (const int64_t axis : {0, 1, 2}) {
    CAPTURE(axis);
    const auto run = [&](torch::ScalarType type, auto&& function) {
      module->to(type);
      std::vector<Tensor> leaves{x.detach().to(type).requires_grad_()};
      for (const Tensor& parameter : module->parameters()) leaves.push_back(parameter);
      return with_gradients(function(leaves[0]), leaves);
    };
    const auto ours = [&](const Tensor& input) { return module->forward(input, axis); };
    const auto formula = [&](const Tensor& input) { return by_formula(module, input, axis); };
    const auto exact = run(torch::kDouble, formula), in_double = run(torch::kDouble, ours);
    for (size_t i = 0; i < exact.size(); ++i) CHECK(largest_difference(in_double[i], exact[i]) < 1e-10);
    check_accuracy(run(torch::kFloat, ours), run(torch::kFloat, formula), exact);
  }
  const auto copy = std::dynamic_pointer_cast<nn::LinearSelfAttentionImpl>(module->clone());
  CHECK(torch::equal(copy->forward(x), module->forward(x)));
  CHECK(module->forward(torch::zeros({4, 12})).abs().max().item<float>() == 0);
}

TEST_CASE("LinearAttention holds its projection, what the heads give and its own: linear in the length") {
  torch::manual_seed(26);
  nn::LinearSelfAttention module(nn::LinearSelfAttentionOptions(32, 4).head_dim(16));
  MemoryMeter meter;
  for (const int64_t axis : {1, 2}) {
    int64_t peak[2];
    for (const int i : {0, 1}) {
      std::vector<int64_t> shape{2, 6, 6, 32};
      shape[axis] = i == 0 ? 500 : 2000;
      const Tensor x = torch::randn(shape).requires_grad_();
      module->forward(x, axis).sum().backward();  // gradients exist from here on
      Tensor output;
      const auto forward = meter.measure([&] { output = module->forward(x, axis); });
      const int64_t tokens = x.numel() / 32, attended = tokens * 64 * 4;
      CHECK(forward.held() <= 3 * attended + attended + tokens * 32 * 4 + 64);
      peak[i] = forward.held() + meter.measure([&] { output.sum().backward(); }).added_peak();
      CHECK(peak[i] < 14 * attended);
    }
    CHECK(peak[1] < 4.2 * peak[0]);
  }
}

TEST_CASE("linear attention refuses what does not fit, and says what it expects") {
  const Tensor x = torch::randn({2, 3, 5, 4});
  const auto id_of = [](auto&& f) { return testing::error_of(f).id(); };
  const std::string id = "headroom.attention.linear";
  CHECK(id_of([&] { linear_attention(x, x, x.narrow(2, 0, 4)); }) == id);
  CHECK(id_of([&] { linear_attention(x, Tensor(), x); }) == id);
  CHECK(id_of([&] { linear_attention(x, x.to(torch::kDouble), x); }) == id);
  CHECK(id_of([&] { linear_attention(x[0][0], x[0][0], x[0][0]); }) == id);
  CHECK(id_of([&] { linear_attention(x, x, x, LinearAttentionOptions().scale(NAN)); }) == id);
  CHECK(id_of([&] { linear_attention(x, x, x, LinearAttentionOptions().log_temperature(torch::ones({2}))); }) == id);
  CHECK(id_of([&] { linear_attention(x, x, x, LinearAttentionOptions().dropout(1)); }) == "headroom.attention.dropout");
  CHECK(id_of([] { nn::LinearSelfAttention(8, 0); }) == "headroom.nn.linear_attention.options");
  nn::LinearSelfAttention module(16, 2);
  const auto error = testing::error_of([&] { module->forward(torch::randn({3, 16}), 1); });
  CHECK(error.id() == "headroom.nn.linear_attention.shape");
  CHECK(testing::contains(error.what(), "x is [3, 16] and the axis 1; expected [...,L,16]"));
}
