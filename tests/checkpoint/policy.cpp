#include "headroom/checkpoint/policy.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "headroom/checkpoint.hpp"
#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "headroom/plan.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

const std::vector<std::string> kExact = {"full",           "every-2",           "every-3",
                                         "selective",      "selective+every-2", "nested",
                                         "nested-3",       "full+offload",      "selective+offload",
                                         "nested+offload", "2*full,none",       "1*every-3+offload,2*nested,selective"};

struct Pass {
  Tensor output;
  std::vector<Tensor> gradients;  // of the input, then of the parameters
};

/// Forward and backward of an encoder on x, weighted by `weights`.
template <class Encoder>
Pass step(Encoder& encoder, const Tensor& x, const Tensor& weights) {
  encoder->zero_grad();
  const Tensor input = x.detach().clone().requires_grad_();
  Pass result{encoder->forward(input), {}};
  (result.output * weights).sum().backward();
  result.gradients.push_back(input.grad());
  for (const Tensor& p : encoder->parameters()) result.gradients.push_back(p.grad().clone());
  return result;
}

void check_equal(const Pass& actual, const Pass& expected) {
  CHECK(actual.output.equal(expected.output));
  REQUIRE(actual.gradients.size() == expected.gradients.size());
  for (size_t i = 0; i < expected.gradients.size(); ++i) CHECK(actual.gradients[i].equal(expected.gradients[i]));
}

/// Largest difference of a gradient from that in double, relative to its largest element.
double error_of(const Pass& actual, const Pass& exact) {
  double worst = 0;
  for (size_t i = 0; i < exact.gradients.size(); ++i) {
    const Tensor difference = (actual.gradients[i].to(torch::kDouble) - exact.gradients[i]).abs().max();
    worst = std::max(worst, (difference / exact.gradients[i].abs().max()).template item<double>());
  }
  return worst;
}

nn::EncoderOptions options_with(nn::EncoderOptions options, const StackPolicy& policy) {
  return options.gradient_checkpointing(policy);
}

const nn::AxialLayerImpl::Axes kAxes = {{"frequency", 2}, {"time", 1}};

/// Calls f(make, shape), where make(options of a policy) is an encoder whose blocks are worth tiling at a size that
/// tests can run: on a grid, where attention has many sequences; on two long sequences, of which attention takes one at
/// a time and the feed-forward network half of one.
template <class F>
void for_each_worth_tiling(F&& f) {
  f([](const auto& with) { return nn::AxialEncoder(with(nn::EncoderOptions(24, 2, {400}, 1)), kAxes); },
    std::vector<int64_t>{1, 100, 160, 24});
  f(
      [](const auto& with) {
        return nn::Encoder(with(nn::EncoderOptions(64, 2, {500, 300}, 2)));
      },
      std::vector<int64_t>{2, 3500, 64});
}

std::string id_of(const std::string& text) {
  return testing::error_of([&] { CheckpointPolicy policy(text); }).id();
}

}  // namespace

TEST_CASE("a checkpoint policy is read from text and written as text") {
  using Recompute = CheckpointPolicy::Recompute;
  CHECK(CheckpointPolicy("none") == CheckpointPolicy());
  CHECK(CheckpointPolicy("full") == CheckpointPolicy(true));
  CHECK(CheckpointPolicy(false) == CheckpointPolicy());
  CHECK(CheckpointPolicy("every-4").every == 4);
  CHECK(CheckpointPolicy("every-4").recompute == Recompute::full);
  CHECK(CheckpointPolicy("every-1") == CheckpointPolicy("full"));
  CHECK(CheckpointPolicy("nested").levels == 2);
  CHECK(CheckpointPolicy("tiled+nested-3+offload").levels == 3);
  CHECK(CheckpointPolicy("offload+tiled").storage == CheckpointStorage::offload);
  for (const char* text : {"none", "full", "every-3", "selective", "selective+every-2", "tiled", "tiled+offload",
                           "nested", "tiled+nested+bf16", "nested-3", "every-2+offload"}) {
    CHECK(CheckpointPolicy(text).text() == text);
  }
  for (const char* text : {"", "ful", "full+", "every-", "every-0", "every-2x", "nested-0", "full+tiled", "none+bf16",
                           "none+nested", "tiled+every-2", "nested+every-2", "selective+nested", "true"}) {
    CAPTURE(text);
    CHECK(id_of(text) == "headroom.checkpoint.policy");
  }
  const Error error = testing::error_of([] { CheckpointPolicy("tilde+offload"); });
  CHECK(testing::contains(error.what(), "\"tilde+offload\", of which \"tilde\" is unknown"));
  CHECK(testing::contains(error.what(), "tiled+offload"));
}

TEST_CASE("a stack's policy has parts for the first blocks and one for the rest") {
  const StackPolicy mixed("6*full+offload,2*none,selective");
  CHECK(mixed == StackPolicy({{6, "full+offload"}, {2, "none"}}, "selective"));
  CHECK(mixed.named_blocks() == 8);
  CHECK(StackPolicy("full") == StackPolicy(CheckpointPolicy("full")));
  CHECK(StackPolicy(true) == StackPolicy("full"));
  CHECK(StackPolicy() == StackPolicy("none"));
  CHECK(StackPolicy("1*full,none") != StackPolicy("2*full,none"));
  for (const char* text : {"none", "tiled+offload", "6*full,none", "1*selective+every-2,3*nested-3+bf16,tiled"}) {
    CHECK(StackPolicy(text).text() == text);
  }
  for (const char* text : {"", ",", "6*full,", ",none", "full,none", "6*full", "6*full,2*none", "0*full,none",
                           "-1*full,none", "x*full,none", "6*ful,none", "6*,none", "*full,none", "6 full,none",
                           "99999999999999999999*full,none", "6*full,,none", "6*full;none"}) {
    CAPTURE(text);
    const Error error = testing::error_of([&] { StackPolicy policy(text); });
    CHECK(error.id() == "headroom.checkpoint.policy");
    CHECK(testing::contains(error.what(), "expected none, full"));
  }
  const auto what = [](const char* text) {
    return std::string(testing::error_of([&] { StackPolicy policy(text); }).what());
  };
  CHECK(testing::contains(what("full,none"), "\"full,none\": \"full\" does not start with a number of blocks"));
  CHECK(testing::contains(what("6*full"), "\"6*full\" comes last and is for all blocks that are left"));
  nn::Encoder encoder(options_with(nn::EncoderOptions(8, 1, {8}, 3), "4*full,none"));
  const Error error = testing::error_of([&] { encoder->forward(torch::randn({1, 5, 8})); });
  CHECK(error.id() == "headroom.checkpoint.policy");
  CHECK(testing::contains(error.what(), "\"4*full,none\", which names 4 blocks; this stack has 3"));
  encoder->options.gradient_checkpointing("3*full,none");
  CHECK(encoder->forward(torch::randn({1, 5, 8})).defined());
}

TEST_CASE("each block is kept as its part of the policy says") {
  const auto recomputed = [](const std::string& text) {  // which blocks' weights recomputation uses
    const Plan planned = plan(
        [&] {
          nn::Encoder encoder(options_with(nn::EncoderOptions(16, 2, {24}, 4), text));
          name_modules(*encoder);
          encoder->forward(torch::randn({2, 30, 16}).requires_grad_()).sum().backward();
        },
        this_machine());
    std::set<char> blocks;
    for (const auto& op : planned.trace.operators) {
      const std::string& module = planned.trace.names[op.module];
      if (planned.trace.names[op.phase] == "recomputation" && module.starts_with("layers.")) blocks.insert(module[7]);
    }
    return std::string(blocks.begin(), blocks.end());
  };
  CHECK(recomputed("none") == "");
  CHECK(recomputed("full") == "0123");
  CHECK(recomputed("1*full,none") == "0");
  CHECK(recomputed("2*none,full") == "23");
  CHECK(recomputed("1*none,2*full,none") == "12");
}

TEST_CASE("every policy that computes the same arithmetic gives the plain gradients, bit for bit") {
  torch::manual_seed(2);
  nn::EncoderOptions options(16, 2, {40, 24}, 5);
  nn::Encoder encoder(options);
  const Tensor x = torch::randn({3, 37, 16}), weights = torch::randn_like(x);
  const Pass plain = step(encoder, x, weights);
  for (const std::string& text : kExact) {
    CAPTURE(text);
    encoder->options.gradient_checkpointing(text);
    check_equal(step(encoder, x, weights), plain);
  }
  SECTION("bf16 rounds what is kept and nothing else: the output is the same") {
    encoder->options.gradient_checkpointing("full+bf16");
    const Pass rounded = step(encoder, x, weights);
    CHECK(rounded.output.equal(plain.output));
    const double error = error_of(rounded, plain);
    CHECK(error > 0);
    CHECK(error < 0.02);
  }
}

TEST_CASE("dropout and autocast are replayed under every policy") {
  torch::manual_seed(2);
  std::vector<torch::nn::Linear> layers;
  std::vector<StackBlock> stack;
  std::vector<Tensor> parameters;
  for (int i = 0; i < 4; ++i) {
    layers.emplace_back(16, 16);
    torch::nn::Linear layer = layers.back();
    stack.push_back({{{[layer](const Tensor& t) mutable {
                         const Tensor attended = attention(t.unsqueeze(1), t.unsqueeze(1), t.unsqueeze(1),
                                                           headroom::AttentionOptions().dropout(0.2))
                                                     .squeeze(1);
                         return t + torch::dropout(torch::gelu(layer(attended)), 0.3, true).to(t.scalar_type());
                       },
                       layer->parameters(),
                       {0}}}});
    for (const Tensor& p : layer->parameters()) parameters.push_back(p);
  }
  const Tensor x = torch::randn({6, 11, 16});
  for (const bool autocast : {false, true}) {
    const auto run = [&](const std::string& policy) {
      torch::manual_seed(9);
      const Tensor input = x.detach().requires_grad_();
      Tensor y;
      {
        std::optional<headroom::detail::AutocastGuard> on;
        if (autocast) on.emplace(at::kCPU, at::kBFloat16);
        y = run_stack(stack, input, policy);
      }
      std::vector<Tensor> all{input};
      all.insert(all.end(), parameters.begin(), parameters.end());
      auto results = torch::autograd::grad({y.pow(2).sum()}, all);
      results.push_back(y);
      results.push_back(torch::rand({3}));  // what is drawn afterwards
      return results;
    };
    const auto plain = run("none");
    for (const std::string& text : kExact) {
      CAPTURE(text, autocast);
      const auto results = run(text);
      for (size_t i = 0; i < plain.size(); ++i) CHECK(results[i].equal(plain[i]));
    }
  }
}

TEST_CASE("tiled blocks give the plain gradients up to rounding, and hooks of their parameters fire once") {
  for_each_worth_tiling([](const auto& make, const std::vector<int64_t>& shape) {
    torch::manual_seed(3);
    auto encoder = make([](const auto& options) { return options; });
    const Tensor x = torch::randn(shape), weights = torch::randn_like(x);
    const Pass plain = step(encoder, x, weights);
    encoder->to(torch::kDouble);
    const Pass exact = step(encoder, x.to(torch::kDouble), weights.to(torch::kDouble));
    encoder->to(torch::kFloat);
    const double of_plain = error_of(plain, exact);
    int fired = 0;
    for (const Tensor& p : encoder->parameters()) p.register_hook([&](const Tensor&) { ++fired; });
    for (const char* text : {"tiled", "tiled+nested", "tiled+offload", "1*full,tiled", "1*tiled+offload,tiled"}) {
      CAPTURE(text, shape);
      encoder->options.gradient_checkpointing(text);
      fired = 0;
      const double of_tiled = error_of(step(encoder, x, weights), exact);
      CHECK(of_tiled < 2 * of_plain);
      CHECK(fired == static_cast<int>(encoder->parameters().size()));
    }
  });
}

TEST_CASE("a stack of blocks that are composed of other modules is tiled, too") {
  struct MeanImpl : torch::nn::Module {
    torch::nn::Linear project = register_module("project", torch::nn::Linear(16, 16));
    Tensor forward(const Tensor& x, int64_t axis) { return project(x).mean(axis, true).expand_as(x); }
  };
  struct Mean : torch::nn::ModuleHolder<MeanImpl> {
    using torch::nn::ModuleHolder<MeanImpl>::ModuleHolder;
  };
  struct TokensImpl : torch::nn::Module {
    torch::nn::Linear up = register_module("up", torch::nn::Linear(16, 700));
    torch::nn::Linear down = register_module("down", torch::nn::Linear(700, 16));
    int64_t most = 0;  // tokens at once
    Tensor forward(const Tensor& x) {
      most = std::max(most, x.numel() / 16);
      return down(up(x).relu());
    }
  };
  struct Tokens : torch::nn::ModuleHolder<TokensImpl> {
    using torch::nn::ModuleHolder<TokensImpl>::ModuleHolder;
  };
  torch::manual_seed(4);
  nn::BasicEncoderBlock<Mean, Tokens> block(16, Mean(), Tokens());
  block->to(torch::kDouble);
  const Tensor x = torch::randn({2, 60, 100, 16}, torch::kDouble), weights = torch::randn_like(x);
  for (const int64_t axis : {1, 2, -2}) {
    CAPTURE(axis);
    const std::vector<StackBlock> stack{nn::stack_block(block, axis, x.dim())};
    const auto gradients = [&](const std::string& policy) {
      const Tensor input = x.detach().requires_grad_();
      std::vector<Tensor> all{input};
      for (const Tensor& p : block->parameters()) all.push_back(p);
      const Tensor y = run_stack(stack, input, policy);
      auto results = torch::autograd::grad({(y * weights).sum()}, all);
      results.push_back(y);
      return results;
    };
    const auto expected = gradients("none");
    block->feed_forward->most = 0;
    const auto actual = gradients("tiled");
    CHECK(block->feed_forward->most < 2 * 60 * 100 / 4);
    for (size_t i = 0; i < expected.size(); ++i) CHECK(torch::allclose(actual[i], expected[i], 1e-10, 1e-12));
  }
}

TEST_CASE("the planned peak is the measured one, byte for byte, under every policy") {
  std::vector<std::string> policies = kExact;
  policies.insert(policies.end(), {"none", "tiled", "tiled+nested", "tiled+offload", "1*full,tiled",
                                   "1*tiled+offload,tiled", "full+bf16", "reversible"});
  for (const std::string& text : policies) {
    CAPTURE(text);
    const auto run = [&text](const auto& make, const std::vector<int64_t>& shape) {
      const auto really = [&] {
        auto encoder = make([&](nn::EncoderOptions options) {
          return text == "reversible" ? options.reversible(true) : options.gradient_checkpointing(text);
        });
        const Tensor x = torch::randn(shape).requires_grad_();
        encoder->forward(x).square().mean().backward();
      };
      really();
      const int64_t measured = MemoryMeter().measure(really).added_peak();
      CHECK(plan(really, this_machine()).peak_bytes == measured);
    };
    run([](const auto& with) { return nn::Encoder(with(nn::EncoderOptions(32, 2, {64}, 5))); }, {3, 50, 32});
    if (testing::contains(text, "tiled")) for_each_worth_tiling(run);
  }
}

TEST_CASE("with few sequences, too, the peak of tiled blocks does not grow with their feed-forward networks") {
  const auto activations = [&](const std::string& policy, int64_t hidden) {
    nn::EncoderOptions options(64, 2, {hidden}, 2);
    nn::Encoder encoder(options.gradient_checkpointing(policy));
    int64_t gradients = 0;
    for (const Tensor& p : encoder->parameters()) gradients += static_cast<int64_t>(p.nbytes());
    const Tensor x = torch::randn({2, 2049, 64}).requires_grad_();
    const auto run = [&] { encoder->forward(x).square().mean().backward(); };
    run();  // measures products
    encoder->zero_grad();
    x.mutable_grad() = Tensor();
    return MemoryMeter().measure(run).added_peak() - gradients;
  };
  const int64_t narrow = activations("tiled", 768), wide = activations("tiled", 3072);
  const int64_t wider = 3072 - 768, added_weights = (64 + 1 + 64) * wider * 4, hidden = 2 * 2049 * wider * 4;
  // A second copy of the gradients of a block's weights, and what rounding to whole slices changes
  CHECK(wide - narrow < added_weights + (1 << 20));
  CHECK(activations("full", 3072) - activations("full", 768) > hidden);
}

TEST_CASE("no policy needs more memory than none, however few the tokens") {
  const auto peak = [](const std::string& text, int64_t layers, int64_t batch, int64_t length) {
    return plan(
               [&] {
                 nn::EncoderOptions options(64, 4, {128, 128}, layers);
                 options.gradient_checkpointing(text);
                 nn::Encoder encoder(options);
                 encoder->forward(torch::randn({batch, length, 64}).requires_grad_()).square().mean().backward();
               },
               this_machine())
        .peak_bytes;
  };
  std::vector<std::string> policies = kExact;
  policies.insert(policies.end(), {"tiled", "tiled+nested", "tiled+offload", "full+bf16", "tiled+bf16"});
  for (const int64_t layers : {4, 12}) {
    for (const int64_t length : {1, 2, 5, 16, 60, 256}) {
      const int64_t none = peak("none", layers, 2, length);
      for (const std::string& text : policies) {
        CAPTURE(text, layers, length);
        CHECK(peak(text, layers, 2, length) <= none);
      }
    }
  }
  SECTION("where slices pay they are made, and the width of the feed-forward network does not matter") {
    const auto activations = [](const std::string& text, std::vector<int64_t> hidden) {
      const nn::EncoderOptions options(24, 2, std::move(hidden), 2);
      const auto step = [&](bool encode) {
        nn::AxialEncoder encoder(options_with(options, text), kAxes);
        for (const Tensor& p : encoder->parameters()) p.mutable_grad() = torch::zeros_like(p);
        const Tensor x = torch::randn({1, 400, 300, 24});
        if (encode) encoder->forward(x).square().mean().backward();
      };
      return plan([&] { step(true); }, this_machine()).peak_bytes -
             plan([&] { step(false); }, this_machine()).peak_bytes;
    };
    const int64_t narrow = activations("tiled", {400}), wide = activations("tiled", {1600});
    CHECK(narrow < activations("full", {400}) / 2);
    CHECK(wide < activations("full", {1600}) / 4);
    CHECK(static_cast<double>(wide) < 1.15 * static_cast<double>(narrow));
  }
}

TEST_CASE("selective computes attention once, holds its output, and all else a second time") {
  const auto planned = [](const std::string& text) {
    return plan(
        [&] {
          nn::EncoderOptions options(48, 3, {96}, 6);
          options.gradient_checkpointing(text);
          nn::Encoder encoder(options);
          encoder->forward(torch::randn({2, 300, 48}).requires_grad_()).sum().backward();
        },
        this_machine());
  };
  const Plan none = planned("none"), full = planned("full"), selective = planned("selective");
  const auto attention = [](const Plan& p) { return p.flops_by_operator.at("headroom::attention"); };
  CHECK(attention(full) == 2 * attention(none));
  CHECK(attention(selective) == attention(none));
  CHECK(selective.flops_by_operator.at("headroom::token_chain") == full.flops_by_operator.at("headroom::token_chain"));
  CHECK(selective.peak_bytes > full.peak_bytes);
  CHECK(selective.peak_bytes < 0.6 * none.peak_bytes);
}

TEST_CASE("a selective checkpoint keeps the results of LibTorch's operators that it is told to") {
  torch::manual_seed(4);
  torch::nn::Linear up(12, 30), down(30, 12);
  const Tensor x = torch::randn({3, 7, 12}).requires_grad_();
  // Linear on three dimensions adds the bias to the product in place; dropout draws random numbers
  const auto forward = [&](const Tensor& t) {
    const Tensor hidden = torch::dropout(torch::gelu(up(t)), 0.3, true);
    const Tensor h = down(hidden);
    return t + torch::bmm(torch::softmax(torch::bmm(h, h.transpose(1, 2)), -1), h).sin();
  };
  const auto run = [&](auto&& call) {
    torch::manual_seed(5);
    const Tensor y = call();
    auto results = torch::autograd::grad({y.pow(2).sum()}, {x, up->weight, up->bias, down->weight, down->bias});
    results.push_back(y.detach());
    results.push_back(torch::rand({2}));
    return results;
  };
  const auto expected = run([&] { return forward(x); });
  // Tensors that an operator makes in recomputation
  const auto made = [&](const std::string& name, KeptOperators keep) {
    const Plan traced = measure_trace([&] {
      const auto actual = run([&] { return selective_checkpoint(keep, forward, x); });
      for (size_t i = 0; i < expected.size(); ++i) CHECK(actual[i].equal(expected[i]));
    });
    const auto& trace = traced.trace;
    return std::count_if(trace.blocks.begin(), trace.blocks.end(), [&](const auto& block) {
      return block.op >= 0 && trace.names[trace.operators[block.op].name] == name &&
             traced.phase_of(block) == "recomputation";
    });
  };
  CHECK(made("aten::bmm", {}) == 2);
  CHECK(made("aten::bmm", {"aten::bmm"}) == 0);
  CHECK(made("aten::gelu", {}) == 1);
  CHECK(made("aten::gelu", {"aten::gelu", "aten::_softmax", "aten::view", "aten::bernoulli_", "aten::add_"}) == 0);
  // The product within linear is changed in place, so it is computed again
  CHECK(made("aten::mm", {}) > 0);
  CHECK(made("aten::mm", {"aten::mm", "aten::bmm"}) == made("aten::mm", {}));
}

TEST_CASE("offloaded checkpoints are no memory of the process and leave no file") {
  torch::manual_seed(6);
  const Tensor x = torch::randn({64, 1 << 18});  // 64 MiB
  const auto storage = checkpoint_pack(CheckpointStorage::offload);
  const testing::TemporaryFolder folder;
  const testing::TemporaryFilesIn there(folder.path());
  const int64_t held = MemoryMeter()
                           .measure([&] {
                             Tensor t = x * 2;
                             Unpack unpack = storage(t);
                             const Tensor copy = t.clone();
                             t = Tensor();
                             const int64_t resident = resident_bytes();
                             CHECK(unpack().equal(copy));
                             CHECK(unpack().equal(copy));  // again, as with retain_graph
                             CHECK(resident_bytes() - resident < 16 << 20);
                           })
                           .held();
  CHECK(held == 0);
  CHECK(folder.names().empty());
  const Tensor permuted = torch::randn({5, 6, 7}).permute({2, 0, 1});
  const Tensor back = storage(permuted)();
  CHECK(back.equal(permuted));
  CHECK(back.strides() == permuted.strides());
  const Tensor narrowed = torch::randn({5, 6}).narrow(1, 1, 3);
  CHECK(storage(narrowed)().equal(narrowed));
  CHECK(storage(torch::arange(5))().equal(torch::arange(5)));
  CHECK(storage(torch::empty({0, 3}))().sizes() == at::IntArrayRef({0, 3}));
}
