#include "headroom/nn.hpp"

#include <torch/nn/utils/convert_parameters.h>

#include "headroom/memory.hpp"
#include "support/catch.hpp"
#include "support/tensors.hpp"

using namespace headroom;
using testing::largest_difference;
using torch::Tensor;

namespace {

std::vector<Tensor> gradients(torch::nn::Module& module, const Tensor& output, const Tensor& grad) {
  module.zero_grad();
  output.backward(grad);
  std::vector<Tensor> result;
  for (const Tensor& p : module.parameters()) result.push_back(p.grad().clone());
  return result;
}

}  // namespace

TEST_CASE("RMSNorm is torch::rms_norm in values and gradients, second ones included") {
  torch::manual_seed(1);
  nn::RMSNorm norm(12);
  norm->to(torch::kDouble);
  {
    torch::NoGradGuard guard;
    norm->weight.copy_(torch::randn({12}));
  }
  const Tensor x = torch::randn({3, 5, 12}, torch::kDouble).requires_grad_(),
               grad = torch::randn({3, 5, 12}, torch::kDouble);
  const Tensor weight = norm->weight;
  const auto derivatives = [&](const Tensor& output) {
    const auto first = torch::autograd::grad({output}, {x, weight}, {grad}, true, true);
    const auto second = torch::autograd::grad({first[0].sin().sum() + first[1].sin().sum()}, {x, weight});
    return std::vector<Tensor>{output, first[0], first[1], second[0], second[1]};
  };
  const auto ours = derivatives(norm->forward(x)), theirs = derivatives(torch::rms_norm(x, {12}, weight, 1e-6));
  for (size_t i = 0; i < ours.size(); ++i) CHECK(largest_difference(ours[i], theirs[i]) < 1e-12);
  CHECK(testing::error_of([&] { norm->forward(torch::randn({3, 1})); }).id() == "headroom.nn.rms_norm.shape");
}

TEST_CASE("RMSNorm in float is as close to double as torch::rms_norm") {
  torch::manual_seed(11);
  for (const int64_t dim : {1, 5, 32, 96}) {
    for (const auto& shape : {std::vector<int64_t>{dim}, {3, 700, dim}}) {
      nn::RMSNorm norm(dim);
      const Tensor x = torch::randn(shape).requires_grad_(), grad = torch::randn(shape);
      const auto theirs = [&](torch::ScalarType type) {
        const Tensor input = x.detach().to(type).requires_grad_(),
                     weight = norm->weight.detach().to(type).requires_grad_();
        const Tensor output = torch::rms_norm(input, {dim}, weight, 1e-6);
        auto all = torch::autograd::grad({output}, {input, weight}, {grad.to(type)});
        all.push_back(output);
        return all;
      };
      const Tensor output = norm->forward(x);
      auto ours = torch::autograd::grad({output}, {x, norm->weight}, {grad});
      ours.push_back(output);
      const auto plain = theirs(torch::kFloat), exact = theirs(torch::kDouble);
      for (size_t i = 0; i < ours.size(); ++i) {
        CAPTURE(dim, shape, i);
        const auto error = [&](const Tensor& t) { return (t - exact[i]).square().mean().sqrt().item<double>(); };
        CHECK(error(ours[i]) <= 2 * error(plain[i]) + 1e-7);
      }
    }
  }
}

TEST_CASE("RMSNorm holds its output") {
  nn::RMSNorm norm(64);
  const Tensor x = torch::randn({1000, 64}).requires_grad_();
  MemoryMeter meter;
  Tensor output;
  CHECK(meter.measure([&] { output = norm->forward(x); }).held() == 1000 * 64 * 4);
}

TEST_CASE("the rotary table rotates by position times frequency, so that scores depend on distance alone") {
  torch::manual_seed(2);
  const Tensor table = nn::rotary_table(50, 8);
  CHECK(torch::view_as_real(table[3][1])
            .to(torch::kDouble)
            .allclose(torch::tensor({std::cos(3 * 0.1), std::sin(3 * 0.1)}, torch::kDouble), 1e-6));
  const Tensor q = torch::randn({8}).expand({50, 8}), k = torch::randn({8}).expand({50, 8});
  const Tensor scores = torch::matmul(nn::rotate(q, table), nn::rotate(k, table).t());
  for (int64_t i = 0; i < 40; i += 7) {
    CHECK(scores[i][i + 9].item<float>() == Approx(scores[0][9].item<float>()).margin(1e-5));
    CHECK(scores[i + 4][i].item<float>() == Approx(scores[4][0].item<float>()).margin(1e-5));
  }
  CHECK(largest_difference(nn::rotate(q, table).norm(2, 1), q.norm(2, 1)) < 1e-5);
  CHECK(testing::error_of([] { nn::rotary_table(4, 7); }).id() == "headroom.nn.rotary.dim");
  CHECK(testing::error_of([&] { nn::rotate(torch::randn({49, 8}), table); }).id() == "headroom.nn.rotary.shape");
}

TEST_CASE("the polar table turns by position times frequency, so that scores depend on distance alone") {
  torch::manual_seed(2);
  const Tensor table = nn::polar_table(50, 8);
  CHECK(table.sizes() == at::IntArrayRef({50, 16}));
  const double angle = 7 * std::pow(1e4, -3.0 / 8);
  CHECK(table[7][3].item<double>() == Approx(std::cos(angle)));
  CHECK(table[7][8 + 3].item<double>() == Approx(std::sin(angle)));
  const Tensor x = torch::randn({8}).expand({1, 1, 50, 8}), v = torch::eye(50).view({1, 1, 50, 50});
  const auto weights = [&](int64_t offset) {
    const auto window = AttentionOptions().window(AttentionWindow{2, 2}).query_offset(offset);
    return attention(x.narrow(-2, 0, 20), x, v, AttentionOptions(window).polar(table));
  };
  const Tensor near = weights(10), far = weights(23);  // the same distances, 13 keys further on
  CHECK(largest_difference(near.slice(-1, 0, 37), far.slice(-1, 13, 50)) < 1e-5);
  CHECK(near.std(-1).min().item<float>() > 0);
}

TEST_CASE("the attention layer is projection, rotation, attention, projection, along any axis") {
  torch::manual_seed(3);
  for (const bool rotary : {true, false}) {
    nn::SelfAttention layer(nn::SelfAttentionOptions(24, 3).rotary(rotary).bias(true));
    const Tensor x = torch::randn({2, 9, 7, 24}).requires_grad_(), grad = torch::randn({2, 9, 7, 24});
    for (const int64_t axis : {1, 2, -2}) {
      const Tensor output = layer->forward(x, axis);
      const auto ours = gradients(*layer, output, grad);
      const Tensor ours_x = x.grad().clone();
      x.mutable_grad() = Tensor();

      const Tensor sequence_last = axis == 1 ? x.transpose(1, 2) : x;  // [.., .., L, C]
      const Tensor qkv = layer->to_qkv->forward(sequence_last).unflatten(-1, {3, 3, 8});
      const auto part = [&](int64_t i) {
        const Tensor heads_first = qkv.select(-3, i).transpose(-3, -2).contiguous();
        return rotary && i < 2 ? nn::rotate(heads_first, nn::rotary_table(heads_first.size(-2), 8)) : heads_first;
      };
      const Tensor attended =
          attention(part(0), part(1), part(2), headroom::AttentionOptions().backend(AttentionBackend::reference));
      Tensor expected = layer->to_out->forward(attended.transpose(-3, -2).flatten(-2));
      if (axis == 1) expected = expected.transpose(1, 2);
      CHECK(largest_difference(output, expected) < 1e-6);
      const auto theirs = gradients(*layer, expected, grad);
      for (size_t i = 0; i < ours.size(); ++i) CHECK(largest_difference(ours[i], theirs[i]) < 1e-4);
      CHECK(largest_difference(ours_x, x.grad()) < 1e-5);
      x.mutable_grad() = Tensor();
    }
  }
}

TEST_CASE("the attention layer's backends agree, causal too, and it follows the sequence length") {
  torch::manual_seed(4);
  nn::SelfAttention tiled(nn::SelfAttentionOptions(16, 2).request(AttentionOptions().causal(true)));
  nn::SelfAttention reference(
      nn::SelfAttentionOptions(16, 2).request(AttentionOptions().causal(true).backend(AttentionBackend::reference)));
  torch::nn::utils::vector_to_parameters(torch::nn::utils::parameters_to_vector(tiled->parameters()),
                                         reference->parameters());
  for (const int64_t length : {1, 40, 13}) {
    const Tensor x = torch::randn({3, length, 16});
    CHECK(largest_difference(tiled->forward(x), reference->forward(x)) < 1e-6);
  }
}

TEST_CASE("the attention layer copies nothing: projection, output and its projection") {
  nn::SelfAttention layer(nn::SelfAttentionOptions(16, 2).rotary(true));
  const Tensor x = torch::randn({1, 64, 50, 16}).requires_grad_();
  layer->forward(x, 1);  // makes the rotary table
  MemoryMeter meter;
  Tensor output;
  const int64_t tensor = 64 * 50 * 16 * 4, lse = 64 * 50 * 2 * 8;
  for (const int64_t axis : {1, 2}) {
    layer->forward(x, axis);
    CHECK(meter.measure([&] { output = layer->forward(x, axis); }).held() == 3 * tensor + tensor + lse + tensor);
    output = Tensor();
  }
}

TEST_CASE("second derivatives through the attention layer are refused") {
  nn::SelfAttention layer(nn::SelfAttentionOptions(8, 2));
  const Tensor x = torch::randn({1, 4, 8}).requires_grad_();
  const Tensor gradient = torch::autograd::grad({layer->forward(x).sum()}, {x}, {}, true, true)[0];
  CHECK(testing::error_of([&] { gradient.sum().backward(); }).id() == "headroom.attention.double_backward");
}

TEST_CASE("feed-forward: linear and GELU through the hidden widths") {
  torch::manual_seed(5);
  nn::FeedForward network(nn::FeedForwardOptions(6, {10, 4}));
  const auto names = network->named_parameters();
  REQUIRE(names.size() == 6);
  CHECK(names["layers.1.weight"].sizes() == at::IntArrayRef({4, 10}));
  const Tensor x = torch::randn({3, 6});
  Tensor expected = x;
  for (int i = 0; i < 3; ++i) {
    const auto n = std::to_string(i);
    expected = torch::matmul(expected, names["layers." + n + ".weight"].t()) + names["layers." + n + ".bias"];
    if (i < 2) expected = expected * 0.5 * (1 + torch::erf(expected / std::sqrt(2.0)));
  }
  CHECK(largest_difference(network->forward(x), expected) < 1e-6);
  CHECK(testing::error_of([] { nn::FeedForward(nn::FeedForwardOptions(6, {})); }).id() ==
        "headroom.nn.feed_forward.hidden");
}

TEST_CASE("a block may be composed of other modules") {
  struct MeanImpl : torch::nn::Module {
    Tensor forward(const Tensor& x, int64_t axis) { return x.mean(axis, true).expand_as(x); }
  };
  struct Mean : torch::nn::ModuleHolder<MeanImpl> {
    using torch::nn::ModuleHolder<MeanImpl>::ModuleHolder;
  };
  nn::BasicEncoderBlock<Mean, nn::Linear> block(4, Mean(), nn::Linear(4, 4));
  torch::NoGradGuard guard;
  block->feed_forward->weight.zero_();
  block->feed_forward->bias.zero_();
  const Tensor x = torch::randn({2, 5, 3, 4});
  CHECK(largest_difference(block->forward(x, 1), x + block->attention_norm->forward(x).mean(1, true)) < 1e-6);
}

TEST_CASE("encoders name their parameters by place and axis; gradient checkpointing changes no bit") {
  torch::manual_seed(6);
  nn::EncoderOptions options(16, 2, {20}, 2);
  nn::AxialEncoder plain(options, nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}});
  nn::AxialEncoder checkpointed(nn::EncoderOptions(options).gradient_checkpointing(true),
                                nn::AxialLayerImpl::Axes{{"frequency", 2}, {"time", 1}});
  CHECK(plain->named_parameters().contains("layers.1.frequency.attention.to_qkv.weight"));
  CHECK(plain->named_parameters().contains("layers.0.time.feed_forward.layers.1.bias"));
  torch::nn::utils::vector_to_parameters(torch::nn::utils::parameters_to_vector(plain->parameters()),
                                         checkpointed->parameters());
  const Tensor x = torch::randn({2, 11, 13, 16}), grad = torch::randn({2, 11, 13, 16});
  const Tensor a = plain->forward(x), b = checkpointed->forward(x);
  CHECK(a.equal(b));
  const auto expected = gradients(*plain, a, grad), recomputed = gradients(*checkpointed, b, grad);
  for (size_t i = 0; i < expected.size(); ++i) CHECK(expected[i].equal(recomputed[i]));

  nn::Encoder sequence(options);
  CHECK(sequence->named_parameters().contains("layers.1.attention.to_out.weight"));
  CHECK(sequence->forward(torch::randn({3, 9, 16})).sizes() == at::IntArrayRef({3, 9, 16}));
}

TEST_CASE("with gradient checkpointing an encoder holds one input per block") {
  const auto held = [](bool gradient_checkpointing, int64_t layers) {
    nn::Encoder encoder(nn::EncoderOptions(32, 2, {64}, layers).gradient_checkpointing(gradient_checkpointing));
    const Tensor x = torch::randn({4, 300, 32});
    encoder->forward(x);  // rotary tables
    MemoryMeter meter;
    Tensor output;
    return meter.measure([&] { output = encoder->forward(x); }).held();
  };
  const int64_t tensor = 4 * 300 * 32 * 4;
  CHECK(held(true, 6) - held(true, 5) <= tensor + 20000);
  CHECK(held(false, 6) - held(false, 5) > 8 * tensor);  // q, k, v, heads, sum, two for the GELU, output
}

TEST_CASE("widths that heads do not divide, odd head dims and foreign shapes are refused") {
  const auto error = [](int64_t dim, int64_t heads) {
    return testing::error_of([&] { nn::SelfAttention(nn::SelfAttentionOptions(dim, heads)); });
  };
  CHECK(error(16, 3).id() == "headroom.nn.attention.heads");
  CHECK(testing::contains(error(16, 3).what(), "3 heads do not divide the width 16"));
  CHECK(error(6, 2).id() == "headroom.nn.rotary.dim");
  nn::SelfAttention layer(nn::SelfAttentionOptions(8, 2));
  CHECK(testing::error_of([&] { layer->forward(torch::randn({2, 3, 9})); }).id() == "headroom.nn.attention.shape");
  CHECK(testing::error_of([&] { layer->forward(torch::randn({2, 3, 8}), 2); }).id() == "headroom.nn.attention.shape");
}
