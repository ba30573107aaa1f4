#include "headroom/nn/multihead_attention.hpp"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <sstream>

#include "headroom/memory.hpp"
#include "support/catch.hpp"

using namespace headroom;
using torch::Tensor;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Inputs {
  Tensor query, key, value, key_padding_mask, attn_mask;
};

Tensor noise_like(const Tensor& x, double step) {
  return torch::cos(torch::arange(x.numel(), torch::kDouble) * step).view(x.sizes()).to(x.scalar_type());
}

/// Output, weights if needed, and the gradients of inputs, a floating-point mask and all parameters. Tensors of
/// `inputs` that are one tensor stay one.
template <class Forward>
std::vector<Tensor> values_and_gradients(const torch::nn::Module& module, Inputs inputs, const Forward& forward) {
  std::vector<Tensor> leaves;
  const auto leaf = [&](const Tensor& x) {
    leaves.push_back(x.detach().clone().requires_grad_());
    return leaves.back();
  };
  const Tensor query = leaf(inputs.query);
  const Tensor key = inputs.key.is_same(inputs.query) ? query : leaf(inputs.key);
  const Tensor value = inputs.value.is_same(inputs.key) ? key : leaf(inputs.value);
  if (inputs.attn_mask.defined() && inputs.attn_mask.is_floating_point()) inputs.attn_mask = leaf(inputs.attn_mask);
  for (const Tensor& parameter : module.parameters()) leaves.push_back(parameter);
  const auto [output, weights] = forward(Inputs{query, key, value, inputs.key_padding_mask, inputs.attn_mask});
  Tensor loss = (output * noise_like(output, 1.7)).sum();
  if (weights.defined()) loss = loss + (weights * noise_like(weights, 0.9)).sum();
  auto results = torch::autograd::grad({loss}, leaves);
  results.push_back(output.detach());
  if (weights.defined()) results.push_back(weights.detach());
  return results;
}

/// The module's formula with scores stored, for what LibTorch's C++ module does not take.
std::tuple<Tensor, Tensor> by_formula(const nn::MultiheadAttention& module, const Inputs& inputs) {
  const int64_t dim = module->options.embed_dim(), heads = module->options.num_heads(), batch = inputs.query.size(1);
  const auto project = [&](const Tensor& x, int64_t i, const Tensor& own) {
    const Tensor weight = own.defined() ? own : module->in_proj_weight.slice(0, i * dim, (i + 1) * dim);
    Tensor y = torch::matmul(x, weight.t());
    if (module->in_proj_bias.defined()) y = y + module->in_proj_bias.slice(0, i * dim, (i + 1) * dim);
    return y.view({x.size(0), batch, heads, -1}).permute({1, 2, 0, 3});
  };
  const Tensor q = project(inputs.query, 0, module->q_proj_weight), k = project(inputs.key, 1, module->k_proj_weight),
               v = project(inputs.value, 2, module->v_proj_weight);
  Tensor scores = torch::matmul(q, k.transpose(-2, -1)) / std::sqrt(dim / heads);
  if (Tensor mask = inputs.attn_mask; mask.defined()) {
    if (mask.dim() == 3) mask = mask.view({batch, heads, mask.size(1), mask.size(2)});
    scores = mask.scalar_type() == torch::kBool ? scores.masked_fill(mask, -kInfinity) : scores + mask;
  }
  if (inputs.key_padding_mask.defined()) {
    scores = scores.masked_fill(inputs.key_padding_mask.unsqueeze(1).unsqueeze(1), -kInfinity);
  }
  const Tensor weights = scores.softmax(-1);
  const Tensor attended = torch::matmul(weights, v).permute({2, 0, 1, 3}).flatten(-2);
  return {torch::linear(attended, module->out_proj->weight, module->out_proj->bias), weights.mean(1)};
}

void check_equal(const std::vector<Tensor>& ours, const std::vector<Tensor>& expected, double tolerance) {
  REQUIRE(ours.size() == expected.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    CAPTURE(i);
    REQUIRE(ours[i].sizes() == expected[i].sizes());
    CHECK((ours[i] - expected[i]).abs().max().item<double>() <= tolerance);
  }
}

/// Errors of all tensors against exact ones, each relative to its size, in one vector.
Tensor relative_errors(const std::vector<Tensor>& values, const std::vector<Tensor>& exact) {
  std::vector<Tensor> errors;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double size = exact[i].square().mean().sqrt().item<double>();
    if (size > 0) errors.push_back((values[i].to(torch::kDouble) - exact[i]).flatten() / size);
  }
  return torch::cat(errors);
}

template <class To, class From>
void load_saved(To& to, const From& from) {
  std::stringstream stream;
  torch::save(from, stream);
  torch::load(to, stream);
}

template <class A, class B>
void check_same_parameters(const A& a, const B& b) {
  const auto ours = a->named_parameters(), theirs = b->named_parameters();
  REQUIRE(ours.size() == theirs.size());
  for (const auto& entry : theirs) CHECK(torch::equal(*ours.find(entry.key()), entry.value()));
}

torch::nn::MultiheadAttentionOptions options_of(unsigned bits, int64_t other_dim) {
  return torch::nn::MultiheadAttentionOptions(12, 3)
      .bias(bits & 1)
      .add_bias_kv(bits & 2)
      .add_zero_attn(bits & 4)
      .kdim(other_dim)
      .vdim(other_dim);
}

}  // namespace

TEST_CASE("MultiheadAttention has LibTorch's parameters, initial values and files") {
  for (unsigned bits = 0; bits < 8; ++bits) {
    for (const int64_t other_dim : {12, 10}) {
      torch::manual_seed(5);
      nn::MultiheadAttention ours(options_of(bits, other_dim));
      torch::manual_seed(5);
      torch::nn::MultiheadAttention theirs(options_of(bits, other_dim));
      check_same_parameters(ours, theirs);
      torch::manual_seed(6);
      nn::MultiheadAttention other(options_of(bits, other_dim));
      load_saved(theirs, other);
      check_same_parameters(other, theirs);
      load_saved(ours, theirs);
      check_same_parameters(ours, other);
      check_same_parameters(
          nn::MultiheadAttention(std::dynamic_pointer_cast<nn::MultiheadAttentionImpl>(ours->clone())), ours);
    }
  }
}

TEST_CASE("MultiheadAttention is LibTorch's in values and gradients, for every option, mask and kind of input") {
  torch::manual_seed(7);
  const int64_t batch = 2;
  const auto real = torch::kDouble;
  for (unsigned bits = 0; bits < 8; ++bits) {
    for (const int64_t other_dim : {12, 10}) {
      nn::MultiheadAttention ours(options_of(bits, other_dim));
      torch::nn::MultiheadAttention theirs(options_of(bits, other_dim));
      for (Tensor& parameter : ours->parameters()) torch::nn::init::normal_(parameter, 0, 0.5);
      load_saved(theirs, ours);
      std::vector<Tensor> ours_errors, their_errors;
      for (const std::string kind : {"self", "key is value", "three tensors"}) {
        if (kind == "self" && other_dim != 12) continue;
        const int64_t queries = 7, keys = kind == "self" ? 7 : 9;
        Inputs given;
        given.query = torch::randn({queries, batch, 12});
        given.key = kind == "self" ? given.query : torch::randn({keys, batch, other_dim});
        given.value = kind == "three tensors" ? torch::randn_like(given.key) : given.key;
        const Tensor scattered = torch::rand({batch, keys}) < 0.3, behind = torch::arange(keys) >= keys - 3;
        const Tensor hidden = torch::rand({queries, keys}) < 0.3;
        scattered.select(1, 0).fill_(false), hidden.select(1, 0).fill_(false);  // every query sees a key
        const Tensor padded = behind.logical_and(torch::tensor({false, true}).unsqueeze(-1));
        for (const Tensor& padding : {Tensor(), scattered, padded}) {
          for (const Tensor& mask : {Tensor(), hidden, torch::randn({queries, keys})}) {
            for (const int needed : {0, 1, 2}) {  // weights: none, averaged, one for each head
              CAPTURE(bits, other_dim, kind, needed, padding.defined() ? padding : Tensor());
              const auto run = [&](auto& module, torch::ScalarType type, bool bool_masks) {
                module->to(type);
                const auto converted = [&](const Tensor& x) { return x.to(type); };
                Inputs inputs{converted(given.query), {}, {}, padding, mask};
                inputs.key = kind == "self" ? inputs.query : converted(given.key);
                inputs.value = kind == "three tensors" ? converted(given.value) : inputs.key;
                const bool is_bool = mask.defined() && mask.scalar_type() == torch::kBool;
                if (mask.defined() && !is_bool) inputs.attn_mask = converted(mask);
                return values_and_gradients(*module, inputs, [&](Inputs x) {
                  if (is_bool && !bool_masks) {
                    x.attn_mask = torch::zeros(mask.sizes(), type).masked_fill(mask, -kInfinity);
                  }
                  return module->forward(x.query, x.key, x.value, x.key_padding_mask, needed > 0, x.attn_mask,
                                         needed == 1);
                });
              };
              const auto exact = run(theirs, real, false);
              check_equal(run(ours, real, true), exact, 1e-12);
              ours_errors.push_back(relative_errors(run(ours, torch::kFloat, true), exact));
              their_errors.push_back(relative_errors(run(theirs, torch::kFloat, false), exact));
            }
          }
        }
      }
      const Tensor our_error = torch::cat(ours_errors), their_error = torch::cat(their_errors);
      CHECK(our_error.square().mean().item<double>() <= 4 * their_error.square().mean().item<double>());
      CHECK(our_error.abs().max().item<double>() <= 4 * their_error.abs().max().item<double>());
    }
  }
}

TEST_CASE("MultiheadAttention takes masks for each head, and keys and values of different widths") {
  torch::manual_seed(8);
  const int64_t batch = 2, heads = 3, queries = 5, keys = 8;
  for (const auto& [kdim, vdim] : {std::pair{12, 12}, {10, 7}}) {
    nn::MultiheadAttention module(torch::nn::MultiheadAttentionOptions(12, heads).kdim(kdim).vdim(vdim));
    module->to(torch::kDouble);
    const Tensor hidden = torch::rand({batch * heads, queries, keys}) < 0.4, padding = torch::rand({batch, keys}) < 0.4;
    hidden.select(2, 1).fill_(false), padding.select(1, 1).fill_(false);
    for (const Tensor& mask : {hidden, torch::randn({batch * heads, queries, keys}, torch::kDouble)}) {
      for (const Tensor& key_padding_mask : {Tensor(), padding}) {
        const Inputs inputs{torch::randn({queries, batch, 12}, torch::kDouble),
                            torch::randn({keys, batch, kdim}, torch::kDouble),
                            torch::randn({keys, batch, vdim}, torch::kDouble), key_padding_mask, mask};
        const auto ours = values_and_gradients(*module, inputs, [&](const Inputs& x) {
          return module->forward(x.query, x.key, x.value, x.key_padding_mask, true, x.attn_mask);
        });
        check_equal(ours, values_and_gradients(*module, inputs, [&](const Inputs& x) { return by_formula(module, x); }),
                    1e-12);
      }
    }
  }
}

TEST_CASE("a query that sees no key gets the bias of the output projection") {
  torch::manual_seed(9);
  nn::MultiheadAttention module(12, 3);
  torch::nn::init::normal_(module->out_proj->bias);
  const Tensor x = torch::randn({6, 2, 12}).requires_grad_();
  Tensor hidden = torch::zeros({6, 6}, torch::kBool), padding = torch::zeros({2, 6}, torch::kBool);
  hidden.narrow(0, 0, 1).narrow(1, 0, 3).fill_(true);       // query 0 sees keys 3 …
  padding.narrow(0, 1, 1).narrow(1, 3, 3).fill_(true);      // … which batch 1 does not have
  const Tensor scattered = padding.flip({1}).contiguous();  // batch 1 lacks keys 0, 1, 2
  for (const auto& [key_padding_mask, dead] : {std::pair{padding, 0}, {scattered, 5}}) {
    const Tensor attn_mask = dead == 0 ? hidden : hidden.flip({0, 1}).contiguous();
    const auto [output, weights] = module->forward(x, x, x, key_padding_mask, true, attn_mask);
    CHECK(torch::equal(output[dead][1], module->out_proj->bias));
    CHECK(weights[1][dead].abs().max().item<float>() == 0);
    CHECK(weights[0].sum(-1).allclose(torch::ones({6})));
    const auto gradient = torch::autograd::grad({output.square().sum() + weights.square().sum()}, {x})[0];
    CHECK(gradient.isfinite().all().item<bool>());
    CHECK(gradient[dead][0].abs().max().item<float>() > 0);
  }
}

TEST_CASE("MultiheadAttention drops weights in training only, the appended key's too, and is right on average") {
  torch::manual_seed(10);
  for (const bool bias_kv : {false, true}) {
    nn::MultiheadAttention module(
        torch::nn::MultiheadAttentionOptions(8, 2).dropout(0.3).add_bias_kv(bias_kv).add_zero_attn(true));
    const int64_t draws = 4000;
    const Tensor x = torch::randn({5, 1, 8}).expand({5, draws, 8}).contiguous();
    torch::NoGradGuard no_grad;
    const auto forward = [&](int seed) {
      torch::manual_seed(seed);
      return std::get<0>(module->forward(x, x, x));
    };
    const Tensor dropped = forward(1);
    CHECK(torch::equal(dropped, forward(1)));
    CHECK_FALSE(torch::equal(dropped, forward(2)));
    CHECK(dropped.std(1).min().item<float>() > 1e-3);
    module->eval();
    const Tensor whole = forward(1);
    CHECK(whole.std(1).max().item<float>() < 1e-5);
    const Tensor deviation = (dropped.mean(1) - whole.mean(1)) / (dropped.std(1) / std::sqrt(draws));
    CHECK(deviation.abs().max().item<float>() < 5);
  }
}

TEST_CASE("MultiheadAttention stores its projections and never a tensor of scores") {
  torch::manual_seed(11);
  MemoryMeter meter;
  const auto step = [&](nn::MultiheadAttention& module, const Tensor& x, const Tensor& padding, const Tensor& mask) {
    return meter.measure([&] { std::get<0>(module->forward(x, x, x, padding, false, mask)).sum().backward(); });
  };
  const int64_t lengths[] = {512, 2048};
  for (const bool appended_keys : {false, true}) {
    nn::MultiheadAttention module(torch::nn::MultiheadAttentionOptions(16, 2)
                                      .add_bias_kv(appended_keys)
                                      .add_zero_attn(appended_keys)
                                      .dropout(0.1));
    for (const std::string masks : {"none", "bool", "additive", "padding", "bool, padding", "additive, padding"}) {
      CAPTURE(appended_keys, masks);
      int64_t peak[2];
      for (const int i : {0, 1}) {
        const int64_t length = lengths[i];
        const Tensor x = torch::randn({length, 1, 16}).requires_grad_();
        const Tensor padding = testing::contains(masks, "padding") ? torch::rand({1, length}) < 0.1 : Tensor();
        Tensor mask;
        if (testing::contains(masks, "bool")) mask = torch::ones({length, length}, torch::kBool).triu(1);
        if (testing::contains(masks, "additive")) mask = torch::zeros({length, length});
        step(module, x, padding, mask);  // gradients exist from here on
        const auto report = step(module, x, padding, mask);
        peak[i] = report.added_peak();
        if (i == 1) CHECK(*report.largest < length * length / 4);
      }
      CHECK(peak[1] < 4.2 * peak[0]);
    }
  }
}

TEST_CASE("MultiheadAttention holds one projection, the heads' output and its own; batch-first views are not copied") {
  torch::manual_seed(12);
  nn::MultiheadAttention module(16, 2);
  const int64_t tokens = 300 * 4, tensor = tokens * 16 * 4, lse = tokens * 2 * 8;
  MemoryMeter meter;
  Tensor output;
  const Tensor x = torch::randn({300, 4, 16}).requires_grad_();
  const Tensor batch_first = torch::randn({4, 300, 16}).requires_grad_();
  for (const Tensor& tokens_in : {x, batch_first.transpose(0, 1)}) {
    std::tie(output, std::ignore) = module->forward(tokens_in, tokens_in, tokens_in);
    output = Tensor();
    const auto report =
        meter.measure([&] { std::tie(output, std::ignore) = module->forward(tokens_in, tokens_in, tokens_in); });
    CHECK(report.held() == 3 * tensor + tensor + lse + tensor);
    CHECK(output.sizes() == tokens_in.sizes());
  }
  CHECK(output.transpose(0, 1).is_contiguous());
  const Tensor same = batch_first.transpose(0, 1).contiguous();
  const auto [expected, none] = module->forward(same, same, same);
  CHECK_FALSE(none.defined());
  CHECK(output.allclose(expected, 1e-5, 1e-6));
}

TEST_CASE("weights with appended keys are given under autocast, where projections are narrower than parameters") {
  torch::manual_seed(9);
  nn::MultiheadAttention module(nn::MultiheadAttentionOptions(8, 2).add_bias_kv(true).add_zero_attn(true));
  const Tensor x = torch::randn({5, 3, 8});
  const auto [expected, expected_weights] = module->forward(x, x, x, {}, /*need_weights=*/true);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto [output, weights] = module->forward(x, x, x, {}, /*need_weights=*/true);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  CHECK((output - expected).abs().max().item<double>() < 0.05);
  CHECK((weights - expected_weights).abs().max().item<double>() < 0.02);
}

TEST_CASE("the mean weights are summed up without the weights of each head") {
  torch::manual_seed(13);
  const int64_t length = 1500, heads = 8, answer = length * length * 4;
  nn::MultiheadAttention module(16, heads);
  const Tensor x = torch::randn({length, 1, 16}).requires_grad_();
  MemoryMeter meter;
  std::tuple<Tensor, Tensor> results;
  const auto report = meter.measure([&] { results = module->forward(x, x, x, {}, true); });
  CHECK(*report.largest < heads * answer / 2);
  CHECK(report.held() < 2 * answer);
}

TEST_CASE("MultiheadAttention refuses wrong shapes and masks, and says what it expects") {
  CHECK(testing::error_of([] { nn::MultiheadAttention(16, 3); }).id() == "headroom.nn.attention.heads");
  nn::MultiheadAttention module(16, 2);
  const Tensor x = torch::randn({5, 3, 16}), y = torch::randn({7, 3, 16});
  const auto id_of = [&](const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& padding = {},
                         const Tensor& mask = {}) {
    return testing::error_of([&] { module->forward(query, key, value, padding, false, mask); }).id();
  };
  const std::string shape = "headroom.nn.multihead_attention.shape", mask = "headroom.nn.multihead_attention.mask";
  CHECK(id_of(x, y, x) == shape);
  CHECK(id_of(x, Tensor(), x) == shape);
  CHECK(id_of(x.select(1, 0), x, x) == shape);
  CHECK(id_of(x, y.narrow(2, 0, 8), y) == shape);
  CHECK(id_of(x, y.narrow(1, 0, 2), y.narrow(1, 0, 2)) == shape);
  CHECK(id_of(x, y, y, torch::zeros({3, 5}, torch::kBool)) == mask);
  CHECK(id_of(x, y, y, torch::zeros({3, 7})) == mask);
  CHECK(id_of(x, y, y, {}, torch::zeros({7, 5})) == mask);
  CHECK(id_of(x, y, y, {}, torch::zeros({5, 7}, torch::kDouble)) == mask);
  CHECK(id_of(x, y, y, {}, torch::zeros({3, 5, 7})) == mask);
  const auto error = testing::error_of([&] { module->forward(x, y, y, {}, false, torch::zeros({5, 5})); });
  CHECK(testing::contains(error.what(), "attn_mask is float [5, 5] on cpu; expected [5, 7] or [6, 5, 7] on cpu: bool"));
}
