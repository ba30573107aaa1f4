#include <torch/torch.h>

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "headroom/audio/losses.hpp"
#include "headroom/checkpoint.hpp"
#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

using Map = std::function<Tensor(const Tensor&)>;

/// A differentiable function of tokens [2,4,24,16], and the leaves that it uses beside them.
struct Differentiable {
  std::string name;
  Map f;
  std::vector<Tensor> parameters = {};
};

/// As a user writes it: what backward needs is the result itself, and saving it is the last thing that happens.
struct Exponential : torch::autograd::Function<Exponential> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& t) {
    const Tensor result = t.exp();
    context->save_for_backward({result});
    return result;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    return {gradients[0] * context->get_saved_variables()[0]};
  }
};

/// The same with two results, the first of which nothing asks for.
struct TwoResults : torch::autograd::Function<TwoResults> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& t) {
    torch::autograd::variable_list results{t.sin(), t.exp()};
    context->save_for_backward({results[0], t, results[1]});
    return results;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    return {gradients[1] * context->get_saved_variables()[2]};
  }
};

Tensor attend(const Tensor& t, AttentionBackend backend) {
  return attention(t, t, t, AttentionOptions().causal(true).backend(backend));
}

template <class Module>
Differentiable of_module(const std::string& name, Module module) {
  return {name, [module](const Tensor& t) mutable { return module->forward(t); }, module->parameters()};
}

std::vector<Differentiable> all_functions() {
  torch::manual_seed(3);
  std::vector<Differentiable> all;
  for (const auto backend :
       {AttentionBackend::tiled, AttentionBackend::fused, AttentionBackend::chunked, AttentionBackend::reference}) {
    std::ostringstream name;
    name << "attention, " << backend;
    all.push_back({name.str(), [backend](const Tensor& t) { return attend(t, backend); }});
  }
  const Tensor bias = torch::randn({1, 1, 24, 24}, torch::requires_grad());
  all.push_back({"attention with a bias and its log-sum-exp",
                 [bias](const Tensor& t) {
                   const auto [output, lse] = attention_with_lse(t, t, t, AttentionOptions().bias(bias));
                   return output + lse.unsqueeze(-1);
                 },
                 {bias}});
  all.push_back({"linear attention", [](const Tensor& t) { return linear_attention(t, t, t); }});
  const Tensor table = nn::rotary_table(24, 16);
  all.push_back({"rotary embedding", [table](const Tensor& t) { return nn::rotate(t, table); }});
  all.push_back({"GELU", [](const Tensor& t) { return torch::gelu(t); }});
  all.push_back({"softmax", [](const Tensor& t) { return torch::softmax(t, -1); }});
  all.push_back({"a user's function", [](const Tensor& t) { return Exponential::apply(t); }});
  all.push_back({"a user's function of two results", [](const Tensor& t) { return TwoResults::apply(t)[1]; }});
  all.push_back(of_module("RMSNorm", nn::RMSNorm(nn::RMSNormOptions(16))));
  all.push_back(of_module("Linear", nn::Linear(16, 16)));
  all.push_back(of_module("FeedForward", nn::FeedForward(nn::FeedForwardOptions(16, {24}))));
  all.push_back(of_module("SelfAttention", nn::SelfAttention(nn::SelfAttentionOptions(16, 2))));
  all.push_back(
      of_module("LinearSelfAttention", nn::LinearSelfAttention(nn::LinearSelfAttentionOptions(16, 2).head_dim(8))));
  all.push_back(of_module("Encoder", nn::Encoder(nn::EncoderOptions(16, 2, {24}, 1))));
  all.push_back(of_module("reversible Encoder", nn::Encoder(nn::EncoderOptions(16, 2, {24}, 2).reversible(true))));
  audio::MultiResolutionStftLoss loss(audio::MultiResolutionStftLossOptions().windows({128, 64}).min_n_fft(128));
  all.push_back({"STFT loss", [loss](const Tensor& t) mutable {
                   const Tensor wave = t.flatten(1);
                   return loss->forward(wave, torch::zeros_like(wave));
                 }});
  return all;
}

struct Policy {
  std::string name;
  std::function<Tensor(const Differentiable&, const Tensor&)> run;
};

std::vector<Policy> all_policies() {
  std::vector<Policy> all{{"none", [](const auto& d, const Tensor& x) { return d.f(x); }},
                          {"checkpoint", [](const auto& d, const Tensor& x) { return checkpoint(d.f, x); }},
                          {"selective_checkpoint of ATen's",
                           [](const auto& d, const Tensor& x) {
                             return selective_checkpoint({"headroom::attention", "aten::exp", "aten::mm"}, d.f, x);
                           }},
                          {"checkpoint around a checkpoint and more",
                           [](const auto& d, const Tensor& x) {
                             return checkpoint([&d](const Tensor& t) { return checkpoint(d.f, t.sin()).sin(); }, x);
                           }},
                          {"reentrant_checkpoint",
                           [](const auto& d, const Tensor& x) { return reentrant_checkpoint(d.parameters, d.f, x); }},
                          {"tiled_checkpoint", [](const auto& d, const Tensor& x) {
                             return d.f(x).dim() == 0 ? d.f(x) : tiled_checkpoint(d.f, x, 0, 2, d.parameters);
                           }}};
  for (const char* const text : {"full", "selective", "tiled", "nested", "full+bf16", "full+offload"}) {
    all.push_back({text, [text](const auto& d, const Tensor& x) {
                     return run_stack({StackBlock{{{d.f, d.parameters, {0, 1}}}}}, x, StackPolicy(text));
                   }});
  }
  return all;
}

void step(const Differentiable& d, const Policy& policy) {
  const Tensor x = torch::ones({2, 4, 24, 16}, torch::requires_grad());
  policy.run(d, x).sum().backward();
  for (const Tensor& p : d.parameters) p.mutable_grad().reset();
}

}  // namespace

TEST_CASE("no function leaks under any checkpoint policy") {
  const MemoryMeter meter;
  const auto policies = all_policies();
  const auto functions = all_functions();
  std::int64_t resident = 0;
  for (int pass = 0; pass < 3; ++pass) {
    if (pass == 1) resident = resident_bytes();  // whatever is made once is there
    for (const Policy& policy : policies) {
      for (const Differentiable& d : functions) {
        CAPTURE(policy.name, d.name);
        step(d, policy);
        const std::int64_t live = meter.live();
        for (int i = 0; i < 4; ++i) step(d, policy);
        CHECK(meter.live() == live);
      }
    }
  }
  // results of 12 KiB: two hundred of those that are dropped above
  CHECK(resident_bytes() - resident < (5 << 19));
}

TEST_CASE("a recomputation or a hook that fails while a function saves its own result leaks nothing") {
  const Tensor x = torch::ones({1000}, torch::requires_grad());
  const MemoryMeter meter;
  const auto held = [&](const auto& f) {
    std::ignore = meter.measure(f);  // errors are formatted by code that allocates once
    return meter.measure(f).held();
  };
  SECTION("what forward saved was something else") {
    CHECK(held([&] {
            int calls = 0;
            const Tensor y = checkpoint(
                [&](const Tensor& t) { return Exponential::apply(++calls == 1 ? t : t.slice(0, 0, 10)).sum(); }, x);
            CHECK(testing::error_of([&] { y.backward(); }).id() == "headroom.checkpoint.mismatch");
          }) == 0);
  }
  SECTION("a hook has no room, and more is computed") {
    CHECK(held([&] {
            const SavedTensorHooks hooks([](const Tensor&) -> Unpack { throw std::runtime_error("no room"); });
            CHECK_THROWS_WITH(Exponential::apply(x).sum(), "no room");
          }) == 0);
  }
  SECTION("a hook has no room, and backward asks for what it was to keep") {
    CHECK(held([&] {
            Tensor y;
            {
              const SavedTensorHooks hooks([](const Tensor&) -> Unpack { throw std::runtime_error("no room"); });
              y = Exponential::apply(x);
            }
            CHECK_THROWS_WITH(y.sum().backward(), "no room");
          }) == 0);
  }
}
