#include "headroom/nn/self_attention.hpp"

#include <torch/nn/utils/convert_parameters.h>

#include "headroom/memory.hpp"
#include "headroom/nn/encoder.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

constexpr auto kDouble = torch::kDouble;

Tensor learned(at::IntArrayRef sizes) { return torch::randn(sizes, kDouble).requires_grad_(); }

/// What a layer with 4 heads may be asked over tokens [2, 9, 7, dim], attended along dimension 1: q is [2, 7, 4, 9, D].
std::vector<std::pair<std::string, AttentionOptions>> layer_requests() {
  using O = AttentionOptions;
  const Tensor seen = torch::rand({2, 7, 1, 9, 9}) > 0.4, few = torch::rand({7, 1, 9, 9}) > 0.7;
  const Tensor starts = torch::tensor({0, 4, 9}), key_starts = torch::tensor({0, 2, 9});
  return {
      {"nothing", O()},
      {"causal", O().causal(true)},
      {"window", O().window(AttentionWindow{2, 1})},
      {"scale, softcap", O().scale(0.9).softcap(0.7)},
      {"lengths", O().key_lengths(torch::randint(0, 10, {2, 7}, torch::kLong))},
      {"lengths of a batch", O().key_lengths(torch::tensor({{5}, {9}}))},
      {"mask", O().mask(seen)},
      {"hidden", O().hidden(few)},
      {"block mask",
       O().block_mask(torch::tensor({{true, false, true}, {false, true, true}, {true, true, false}})).block_size(4)},
      {"bias", O().bias(learned({2, 1, 4, 9, 9}))},
      {"bias for all", O().bias(learned({9, 9}))},
      {"relative bias", O().relative_bias(learned({4, 7}))},
      {"slopes", O().alibi_slopes(learned({4, 1}))},
      {"slopes of queries", O().alibi_slopes(learned({2, 7, 4, 9}))},
      {"sink", O().sink(learned({4}))},
      {"offset", O().query_offset(2).causal(true)},
      {"sequences", O().sequence_starts(starts).causal(true)},
      {"sequences of keys", O().sequence_starts(starts).key_sequence_starts(key_starts)},
      {"bottom right", O().sequence_starts(starts)
                           .key_sequence_starts(key_starts)
                           .causal(true)
                           .alignment(AttentionAlignment::bottom_right)},
      {"dropout", O().dropout(0.3).seed(5)},
      {"much", O().causal(true)
                   .window(AttentionWindow{5, 0})
                   .key_lengths(torch::tensor({{8}, {6}}))
                   .bias(learned({4, 9, 9}))
                   .sink(learned({4}))
                   .softcap(2)}};
}

std::vector<Tensor> with_gradients_of(const Tensor& output, const std::vector<Tensor>& leaves) {
  const Tensor grad = torch::cos(torch::arange(output.numel(), kDouble)).view(output.sizes()).to(output.dtype());
  auto results = torch::autograd::grad({output}, leaves, {grad}, {}, false, /*allow_unused=*/true);
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (!results[i].defined()) results[i] = torch::zeros_like(leaves[i]);
  }
  results.push_back(output.detach());
  return results;
}

double largest_of_differences(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  REQUIRE(a.size() == b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    REQUIRE(a[i].sizes() == b[i].sizes());
    REQUIRE(a[i].isfinite().all().item<bool>());
    largest = std::max(largest, (a[i] - b[i]).abs().max().item<double>());
  }
  return largest;
}

/// The layer along dimension 1 of x by its parts, heads of k and v repeated, scores stored.
Tensor by_parts(nn::SelfAttention layer, const Tensor& x, AttentionOptions request) {
  const int64_t heads = layer->options.heads(), kv_heads = layer->options.kv_heads().value_or(heads);
  const Tensor all =
      layer->to_qkv->forward(x.movedim(1, -2)).unflatten(-1, {heads + 2 * kv_heads, -1}).transpose(-3, -2);
  const Tensor k = all.narrow(-3, heads, kv_heads).repeat_interleave(heads / kv_heads, -3);
  const Tensor v = all.narrow(-3, heads + kv_heads, kv_heads).repeat_interleave(heads / kv_heads, -3);
  if (layer->options.rotary()) request.rotary(nn::rotary_table(x.size(1) + 20, all.size(-1)));
  const Tensor attended =
      attention(all.narrow(-3, 0, heads), k, v, request.backend(AttentionBackend::reference));  // [...,H,L,D]
  return layer->to_out->forward(attended.transpose(-3, -2).flatten(-2)).movedim(-2, 1);
}

}  // namespace

TEST_CASE("a self-attention layer gives what its parts give, whatever it is asked, in values and gradients") {
  torch::manual_seed(21);
  const auto requests = layer_requests();
  for (const bool rotary : {false, true}) {
    for (const int64_t kv_heads : {4, 2}) {
      nn::SelfAttention layer(
          nn::SelfAttentionOptions(20, 4).kv_heads(kv_heads).head_dim(6).rotary(rotary).bias(kv_heads == 2));
      layer->to(kDouble);
      const Tensor x = learned({2, 9, 7, 20});
      for (const auto& [name, request] : requests) {
        if (rotary && name == "bottom right") continue;  // negative positions
        CAPTURE(name, rotary, kv_heads);
        std::vector<Tensor> leaves = layer->parameters();
        leaves.push_back(x);
        for (const Tensor& t : headroom::detail::differentiable(request)) leaves.push_back(t);
        const auto expected = with_gradients_of(by_parts(layer, x, request), leaves);
        CHECK(largest_of_differences(with_gradients_of(layer->forward(x, 1, request), leaves), expected) < 1e-10);
        nn::SelfAttention asked(nn::SelfAttentionOptions(layer->options).request(request));
        asked->to(kDouble);
        torch::nn::utils::vector_to_parameters(torch::nn::utils::parameters_to_vector(layer->parameters()),
                                               asked->parameters());
        CHECK((asked->forward(x, 1) - expected.back()).abs().max().item<double>() < 1e-10);
      }
    }
  }
}

TEST_CASE("a layer of grouped heads with a bias is PyTorch's attention of its projections") {
  torch::manual_seed(22);
  nn::SelfAttention layer(nn::SelfAttentionOptions(24, 4).kv_heads(2).rotary(false));
  layer->to(kDouble);
  const Tensor x = learned({3, 10, 24}), bias = learned({3, 4, 10, 10});
  std::vector<Tensor> leaves = layer->parameters();
  leaves.insert(leaves.end(), {x, bias});
  const Tensor all = layer->to_qkv->forward(x).unflatten(-1, {8, 6}).transpose(1, 2);
  const Tensor attended = torch::scaled_dot_product_attention(all.narrow(1, 0, 4), all.narrow(1, 4, 2),
                                                              all.narrow(1, 6, 2), bias, 0, false, {}, true);
  const auto expected = with_gradients_of(layer->to_out->forward(attended.transpose(1, 2).flatten(-2)), leaves);
  const Tensor output = layer->forward(x, -2, AttentionOptions().bias(bias));
  CHECK(largest_of_differences(with_gradients_of(output, leaves), expected) < 1e-12);
}

TEST_CASE("rotary embedding needs positions from 0 on, as attention does") {
  nn::SelfAttention layer(nn::SelfAttentionOptions(8, 2));
  const Tensor starts = torch::tensor({0, 4, 9}), key_starts = torch::tensor({0, 2, 9});
  const auto request = AttentionOptions()
                           .sequence_starts(starts)
                           .key_sequence_starts(key_starts)
                           .alignment(AttentionAlignment::bottom_right);
  CHECK(testing::error_of([&] {
          layer->forward(torch::randn({2, 9, 8}), -2, request);
        }).id() == "headroom.attention.rotary");
}

TEST_CASE("a layer's own sink and relative bias are parameters, and a request cannot bring others") {
  torch::manual_seed(23);
  nn::SelfAttention layer(nn::SelfAttentionOptions(8, 2).sink(true).relative_bias(3));
  layer->to(kDouble);
  {
    torch::NoGradGuard guard;
    layer->sink.normal_();
    layer->relative_bias.normal_();
  }
  const auto names = layer->named_parameters();
  REQUIRE(names["sink"].sizes() == at::IntArrayRef({2}));
  REQUIRE(names["relative_bias"].sizes() == at::IntArrayRef({2, 5}));
  const Tensor x = learned({2, 9, 3, 8});
  std::vector<Tensor> leaves = layer->parameters();
  leaves.push_back(x);
  const auto request = AttentionOptions().sink(layer->sink).relative_bias(layer->relative_bias);
  const auto expected = with_gradients_of(by_parts(layer, x, request), leaves);
  CHECK(largest_of_differences(with_gradients_of(layer->forward(x, 1), leaves), expected) < 1e-10);
  CHECK(expected[layer->parameters().size() - 1].abs().max().item<double>() > 1e-6);  // the last one's gradient
  const auto id = [&](const AttentionOptions& request) {
    return testing::error_of([&] { layer->forward(x, 1, request); }).id();
  };
  CHECK(id(AttentionOptions().sink(layer->sink)) == "headroom.nn.attention.request");
  CHECK(id(AttentionOptions().relative_bias(layer->relative_bias)) == "headroom.nn.attention.request");
  CHECK(id(AttentionOptions().rotary(nn::rotary_table(9, 4))) == "headroom.nn.attention.request");
  CHECK(testing::error_of([] { nn::SelfAttention(nn::SelfAttentionOptions(8, 4).kv_heads(3)); }).id() ==
        "headroom.nn.attention.heads");
}

TEST_CASE("weights are dropped while training, by the request's own generator too") {
  torch::manual_seed(24);
  const Tensor x = torch::randn({2, 30, 16});
  nn::EncoderOptions options(16, 2, {20}, 2);
  const auto run = [&](const StackPolicy& policy, bool training) {
    torch::manual_seed(25);
    nn::Encoder encoder(nn::EncoderOptions(options).gradient_checkpointing(policy));
    encoder->train(training);
    const auto request = AttentionOptions().dropout(0.4).generator(at::detail::createCPUGenerator(7));
    return with_gradients_of(encoder->forward(x, -2, request), encoder->parameters());
  };
  const auto plain = run("none", true);
  for (const char* policy : {"full", "selective", "nested", "tiled"}) {
    CAPTURE(policy);
    CHECK(largest_of_differences(run(policy, true), plain) < 1e-5);
  }
  CHECK(largest_of_differences(run("none", false), plain) > 1e-3);
}

namespace {

/// An encoder with tokens enough for slices, asked for lengths of a batch and for learned terms, and all gradients of a
/// pass through it.
std::vector<Tensor> run_asked_encoder(const std::string& policy) {
  torch::manual_seed(26);
  nn::EncoderOptions options(64, 4, {256}, 1);
  options.attention().kv_heads(2);
  policy == "reversible" ? options.reversible(true) : options.gradient_checkpointing(policy);
  nn::AxialEncoder encoder(options, nn::AxialLayerImpl::Axes{{"time", 1}, {"frequency", 2}});
  const Tensor x = torch::randn({4, 64, 32, 64}).requires_grad_();
  const Tensor sink = torch::randn({4}).requires_grad_(), base = torch::randn({4, 32, 32}).requires_grad_();
  const Tensor table = torch::randn({4, 64}).requires_grad_();
  const auto own = [](auto score, auto at, auto by_key) { return score + 0.1 * score * by_key(at.head, at.key); };
  const Tensor lengths = [] {
    const HostTensors host;
    return torch::tensor({64, 3, 40, 1}).view({4, 1});
  }();
  const Tensor output = encoder->forward(  // base * 2 is no leaf
      x, {{"time", AttentionOptions().key_lengths(lengths).causal(true).sink(sink).score_function(
                       ScoreFunction(own, table * 2))},
          {"frequency", AttentionOptions().bias(base * 2).window(AttentionWindow{9, 9}).global_keys(3)}});
  std::vector<Tensor> leaves = encoder->parameters();
  leaves.insert(leaves.end(), {x, sink, base, table});
  auto results = torch::autograd::grad({output.square().mean()}, leaves);
  results.push_back(output.detach());
  return results;
}

}  // namespace

TEST_CASE("requests hold under every checkpoint policy, with the gradients of what they bring, and as planned") {
  const auto plain = run_asked_encoder("none");
  for (const std::string policy : {"none", "selective", "full+offload", "tiled", "reversible"}) {
    CAPTURE(policy);
    std::vector<Tensor> results;
    const int64_t measured = MemoryMeter().measure([&] { results = run_asked_encoder(policy); }).added_peak();
    CHECK(plan([&] { run_asked_encoder(policy); }, this_machine()).peak_bytes == measured);
    if (policy == "reversible") continue;  // another model
    for (size_t i = 0; i < plain.size(); ++i) {
      CAPTURE(i);
      if (policy == "tiled") {  // sums of slices
        CHECK((results[i] - plain[i]).abs().max().item<double>() <= 1e-4 * plain[i].abs().max().item<double>());
      } else {
        CHECK(results[i].equal(plain[i]));
      }
    }
  }
}

TEST_CASE("a reversible encoder asks its attention the same") {
  torch::manual_seed(27);
  nn::Encoder encoder(nn::EncoderOptions(16, 2, {20}, 2).reversible(true));
  encoder->to(kDouble);
  const Tensor x = learned({3, 12, 16}), bias = learned({2, 12, 12});
  const auto request = AttentionOptions().bias(bias).key_lengths(torch::tensor({12, 5, 8}));
  std::vector<Tensor> leaves = encoder->parameters();
  leaves.insert(leaves.end(), {x, bias});
  Tensor first = x, second = x;
  for (const auto& layer : *encoder->layers) {
    auto& block = *layer->as<nn::EncoderBlock>();
    first = first + block.attention->forward(block.attention_norm->forward(second), -2, request);
    second = second + block.feed_forward->forward(block.feed_forward_norm->forward(first));
  }
  const auto expected = with_gradients_of((first + second) * 0.5, leaves);
  CHECK(largest_of_differences(with_gradients_of(encoder->forward(x, -2, request), leaves), expected) < 1e-10);
}

TEST_CASE("requests for axes that are not there, and for attention that takes none, are refused") {
  struct AverageImpl : torch::nn::Module {
    Tensor forward(const Tensor& x, int64_t axis) { return x.mean(axis, true).expand_as(x); }
  };
  struct Average : torch::nn::ModuleHolder<AverageImpl> {
    using torch::nn::ModuleHolder<AverageImpl>::ModuleHolder;
  };
  nn::BasicEncoderBlock<Average, nn::Linear> block(4, Average(), nn::Linear(4, 4));
  CHECK(testing::error_of([&] {
          block->forward(torch::randn({2, 5, 4}), -2, AttentionOptions());
        }).id() == "headroom.nn.encoder.request");
  nn::AxialEncoder encoder(nn::EncoderOptions(8, 2, {8}, 1), nn::AxialLayerImpl::Axes{{"time", 1}});
  CHECK(testing::error_of([&] {
          encoder->forward(torch::randn({2, 5, 8}), {{"tiem", AttentionOptions()}});
        }).id() == "headroom.nn.encoder.axis");
}
