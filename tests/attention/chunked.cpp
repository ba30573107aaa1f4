#include "headroom/memory.hpp"
#include "headroom/nn.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

TEST_CASE("chunked attention and all its gradients equal the reference in double") {
  for (const AttentionCase& request : attention_cases()) {
    INFO(request.name);
    check_same(run_case(request, AttentionBackend::chunked), run_case(request, AttentionBackend::reference), 1e-12);
  }
}

TEST_CASE("chunked attention errs no more than the rule allows in narrow dtypes") {
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    AccuracyRule rule(AttentionBackend::chunked, dtype);
    for (const AttentionCase& request : attention_cases()) {
      INFO(dtype << ", " << request.name);
      rule.check(request);
    }
  }
}

TEST_CASE("the size of chunks changes nothing but rounding") {
  using headroom::detail::ChunkedAttention;
  for (const AttentionCase& given : attention_cases()) {
    INFO(given.name);
    const auto& [name, q, k, v, options, unused] = given;
    const auto request = headroom::detail::AttentionRequest::check(q, k, v, options);
    ChunkedAttention whole({q, k, v, request});
    const auto expected = whole.forward();
    const Tensor grad = torch::randn_like(expected.output), grad_lse = torch::randn_like(expected.lse);
    const auto expected_grad = whole.backward(expected, {grad, grad_lse},
                                              {1, 1, 1, options.bias().has_value(), options.relative_bias().has_value(),
                                               options.alibi_slopes().has_value(), options.sink().has_value()});
    for (const headroom::detail::ChunkSizes sizes : {headroom::detail::ChunkSizes{1, 5, 7}, {2, 16, 1}, {3, 1, 64}}) {
      ChunkedAttention chunked({q, k, v, request}, sizes);
      const auto result = chunked.forward();
      const auto same = [](const Tensor& a, const Tensor& b) {
        REQUIRE(a.defined() == b.defined());
        if (b.defined()) CHECK(largest((a - b).masked_fill(a == b, 0)) < 1e-12);
      };
      same(result.output, expected.output), same(result.lse, expected.lse);
      const auto result_grad =
          chunked.backward(result, {grad, grad_lse},
                           {1, 1, 1, options.bias().has_value(), options.relative_bias().has_value(),
                            options.alibi_slopes().has_value(), options.sink().has_value()});
      same(result_grad.q, expected_grad.q), same(result_grad.k, expected_grad.k), same(result_grad.v, expected_grad.v);
      same(result_grad.bias, expected_grad.bias), same(result_grad.relative_bias, expected_grad.relative_bias);
      same(result_grad.alibi_slopes, expected_grad.alibi_slopes), same(result_grad.sink, expected_grad.sink);
    }
  }
}

TEST_CASE("what a query may not see never reaches it, nor the gradients of others") {
  torch::manual_seed(5);
  const Tensor starts = torch::tensor({0, 4, 9});
  const Tensor mask = torch::ones({9, 9}, torch::kBool).tril();
  const Tensor blocks = torch::tensor({{true, false}, {true, true}});
  using O = AttentionOptions;
  // In each of these, queries 0 … 3 see no key behind 3
  const std::pair<std::string, O> requests[] = {
      {"key lengths", O().key_lengths(torch::tensor(4))},
      {"causal", O().causal(true)},
      {"window", O().window(AttentionWindow{2, 0})},
      {"sequences", O().sequence_starts(starts)},
      {"mask", O().mask(mask)},
      {"hidden", O().hidden(mask.logical_not())},
      {"block mask", O().block_mask(blocks).block_size(4 + 1).causal(true)},
      {"softcap, sink, rotary and bias", O().causal(true)
                                             .softcap(2)
                                             .sink(torch::randn({2}))
                                             .bias(torch::randn({9, 9}))
                                             .rotary(torch::polar(torch::ones({9, 2}), torch::rand({9, 2})))},
  };
  const Tensor q = torch::randn({1, 2, 9, 4}), k = torch::randn({1, 2, 9, 4}), v = torch::randn({1, 2, 9, 4});
  for (const auto backend : {AttentionBackend::chunked, AttentionBackend::reference}) {
    for (const auto& [name, options] : requests) {
      INFO(backend << ", " << name);
      const auto head = [&](Tensor a, Tensor b, Tensor c) {
        a = a.detach().requires_grad_(), b = b.detach().requires_grad_(), c = c.detach().requires_grad_();
        const auto [output, lse] = attention_with_lse(a, b, c, O(options).backend(backend));
        (output.slice(2, 0, 4).square().sum() + lse.slice(2, 0, 4).sum()).backward();
        std::vector<Tensor> first;
        for (const Tensor& x : {output.detach(), lse.detach(), a.grad(), b.grad(), c.grad()})
          first.push_back(x.slice(2, 0, 4));
        return first;
      };
      const auto clean = head(q, k, v);
      for (const float planted : {std::nanf(""), INFINITY}) {
        Tensor bad_k = k.clone(), bad_v = v.clone();
        bad_k.select(2, 6).select(-1, 1).fill_(planted), bad_v.select(2, 5).fill_(planted);
        const auto poisoned = head(q, bad_k, bad_v);
        // Where later queries see both, their NaN is in the gradients of k and v
        const bool apart = name == "key lengths" || name == "sequences";
        for (size_t i = 0; i < (apart ? clean.size() : 3); ++i) CHECK(poisoned[i].equal(clean[i]));
      }
    }
  }
  // Who may see it gets NaN
  Tensor bad_v = v.clone();
  bad_v.select(2, 5).fill_(std::nanf(""));
  const Tensor output = attention(q, k, bad_v, O().causal(true).backend(AttentionBackend::chunked));
  CHECK(output.isnan().all(-1).equal((torch::arange(9) >= 5).expand({1, 2, 9})));
}

TEST_CASE("NaN in the gradient of an output stays with the keys its query sees") {
  torch::manual_seed(6);
  const Tensor q = torch::randn({1, 1, 8, 4}).requires_grad_(), k = torch::randn({1, 1, 8, 4}).requires_grad_(),
               v = torch::randn({1, 1, 8, 4}).requires_grad_();
  Tensor grad = torch::ones({1, 1, 8, 4});
  grad.select(2, 6).fill_(std::nanf(""));
  attention(q, k, v, AttentionOptions().sequence_starts(torch::tensor({0, 5, 8})).backend(AttentionBackend::chunked))
      .backward(grad);
  for (const Tensor& x : {q, k, v}) CHECK(x.grad().slice(2, 0, 5).isfinite().all().item<bool>());
  CHECK(v.grad().slice(2, 5).isnan().all().item<bool>());
}

TEST_CASE("what is not finite in a query or its gradient stays with the keys that it sees") {
  torch::manual_seed(12);
  const Tensor k = torch::randn({1, 1, 60, 4}), q = torch::randn({1, 1, 60, 4}), v = torch::randn({1, 1, 60, 4});
  using O = AttentionOptions;
  const std::pair<std::string, O> requests[] = {
      {"sequences", O().sequence_starts(torch::tensor({0, 20, 40, 60})).sink(torch::randn({1}))},
      {"window", O().window(AttentionWindow{5, 5})},
      {"mask", O().mask((torch::arange(60) < 40).unsqueeze(-1) == (torch::arange(60) < 40))},
      {"a query without keys", O().mask((torch::arange(60) < 40).unsqueeze(-1)).sink(torch::randn({1}))}};
  for (const auto backend : {AttentionBackend::chunked, AttentionBackend::reference}) {
    for (const auto& [name, given] : requests) {
      const auto run = [&, &options = given](const Tensor& query, const Tensor& grad) {
        const Tensor a = query.detach().requires_grad_(), b = k.detach().requires_grad_(),
                     c = v.detach().requires_grad_();
        std::vector<Tensor> leaves{b, c};
        O o = options;
        if (o.sink().has_value() && name == "a query without keys") {
          o.sink(o.sink()->detach().requires_grad_());
          leaves.push_back(*o.sink());
        }
        return torch::autograd::grad({attention(a, b, c, o.backend(backend))}, leaves, {grad});
      };
      const Tensor grad = torch::ones({1, 1, 60, 4});
      const auto clean = run(q, grad);
      for (const bool in_query : {false, true}) {
        INFO(backend << ", " << name << (in_query ? ", in q" : ", in the gradient"));
        Tensor bad_q = q.clone(), bad_grad = grad.clone();
        (in_query ? bad_q : bad_grad).select(2, 55).fill_(std::nanf(""));
        const auto poisoned = run(bad_q, bad_grad);
        CHECK(poisoned[0].slice(2, 0, 40).equal(clean[0].slice(2, 0, 40)));
        CHECK(poisoned[1].slice(2, 0, 40).equal(clean[1].slice(2, 0, 40)));
        if (poisoned.size() == 3) CHECK(poisoned[2].equal(clean[2]));
        if (poisoned.size() == 2) CHECK(poisoned[1].select(2, 55).isnan().all().item<bool>());
      }
    }
  }
}

TEST_CASE("scores of the least number: the mean of what is seen, with its gradients") {
  for (const auto dtype : {torch::kFloat, torch::kDouble}) {
    const double least =
        dtype == torch::kFloat ? std::numeric_limits<float>::lowest() : std::numeric_limits<double>::lowest();
    const Tensor q = torch::zeros({1, 1, 2, 4}, dtype), k = torch::zeros({1, 1, 8, 4}, dtype);
    for (const auto backend : {AttentionBackend::chunked, AttentionBackend::reference}) {
      INFO(backend << ", " << dtype);
      const Tensor v = torch::arange(32, dtype).view({1, 1, 8, 4}).requires_grad_(),
                   sink = torch::full({1}, least, dtype).requires_grad_();
      const auto options = AttentionOptions().bias(torch::full({8}, least, dtype)).backend(backend);
      const auto [output, lse] = attention_with_lse(q, k, v, options);
      CHECK(largest(output.detach() - v.detach().mean(2, true)) < 1e-6);
      CHECK(lse.isfinite().all().item<bool>());
      CHECK(largest(torch::autograd::grad({output.sum()}, {v})[0] - 2.0 / 8) < 1e-7);
      // The sink takes the share of one key more
      const Tensor shared = attention(q, k, v, AttentionOptions(options).sink(sink));
      CHECK(largest(torch::autograd::grad({shared.sum()}, {v}, {}, /*retain_graph=*/true)[0] - 2.0 / 9) < 1e-7);
      const double mean = v.detach().mean().item<double>();
      CHECK(std::abs(torch::autograd::grad({shared.sum()}, {sink})[0].item<double>() + 2 * 4 * mean * 8 / 81) < 1e-4);
    }
  }
}

TEST_CASE("rotation of features that lie at odd places") {
  torch::manual_seed(13);
  const Tensor memory = torch::randn({1 + 2 * 9 * 5}), angles = torch::rand({9, 2});
  const Tensor table = torch::polar(torch::ones_like(angles), angles);
  const Tensor q = memory.slice(0, 1).view({1, 2, 9, 5}).narrow(-1, 0, 4), dense = q.contiguous().clone();
  const Tensor odd = memory.slice(0, 1, 73).view({1, 2, 9, 4}), even = odd.clone();
  REQUIRE(odd.storage_offset() == 1);
  for (const auto backend : {AttentionBackend::tiled, AttentionBackend::chunked, AttentionBackend::reference}) {
    const auto options = AttentionOptions().rotary(table).backend(backend);
    CHECK(attention(q, q, q, options).equal(attention(dense, dense, dense, options)));
    CHECK(attention(odd, odd, odd, options).equal(attention(even, even, even, options)));
  }
  CHECK(nn::rotate(odd, table).equal(nn::rotate(even, table)));
}

TEST_CASE("an output may be changed in place") {
  torch::manual_seed(14);
  const Tensor base = torch::randn({1, 9, 2, 4}).requires_grad_(), x = torch::randn({1, 2, 9, 4});
  const Tensor q = base.transpose(1, 2);
  const auto changed = [&](Tensor output) { return output.add_(x).detach().clone(); };
  for (const auto backend :
       {AttentionBackend::tiled, AttentionBackend::fused, AttentionBackend::chunked, AttentionBackend::reference}) {
    INFO(backend);
    const auto options = AttentionOptions().backend(backend);
    CHECK(changed(attention(q, q, q, options)).equal(attention(q, q, q, options) + x));
  }
  Tensor lse = attention_with_lse(q.to(torch::kDouble), q.to(torch::kDouble), q.to(torch::kDouble)).lse;
  CHECK_NOTHROW(lse.add_(1));
  CHECK_NOTHROW(attention_weights(q, q).add_(1));
  Tensor linear = linear_attention(q, q, q);
  linear += x;  // and that one does not need its output in the backward pass
  CHECK(torch::autograd::grad({linear.sum()}, {base})[0].equal(
      torch::autograd::grad({linear_attention(q, q, q).sum()}, {base})[0]));
  nn::SelfAttention layer(nn::SelfAttentionOptions(8, 2));
  CHECK_NOTHROW(layer->forward(torch::randn({2, 9, 8})).add_(1));
  const Tensor packed = torch::randn({2, 9, 6, 4}).requires_grad_();
  CHECK_NOTHROW(headroom::detail::packed_attention(packed * 1, 2, std::nullopt, 1, {}).add_(1));
}

TEST_CASE("the reference computes 16 bits in float") {
  torch::manual_seed(15);
  const Tensor q = torch::randn({1, 2, 30, 8}, torch::kDouble);
  const auto options = [](torch::ScalarType dtype) {
    return AttentionOptions()
        .alibi_slopes(torch::full({2, 1}, 0.5, dtype))
        .query_offset(1000)
        .backend(AttentionBackend::reference);
  };
  const Tensor narrow = q.to(torch::kBFloat16), exact = narrow.to(torch::kDouble);
  const Tensor output = attention(narrow, narrow, narrow, options(torch::kBFloat16));
  CHECK(output.scalar_type() == torch::kBFloat16);
  CHECK(largest(output - attention(exact, exact, exact, options(torch::kDouble))) < 0.01);
}

TEST_CASE("a query without keys gets 0, -inf and no gradient from chunked attention") {
  torch::manual_seed(7);
  const Tensor q = torch::randn({2, 2, 5, 4}).requires_grad_(), k = torch::randn({2, 2, 5, 4}).requires_grad_(),
               v = torch::randn({2, 2, 5, 4}).requires_grad_();
  const auto [output, lse] = attention_with_lse(
      q, k, v, AttentionOptions().key_lengths(torch::tensor({0, 5})).backend(AttentionBackend::chunked));
  CHECK(output[0].equal(torch::zeros({2, 5, 4})));
  CHECK(lse[0].equal(torch::full({2, 5}, -INFINITY)));
  (output.sum() + lse.sum()).backward();
  for (const Tensor& x : {q, k, v}) CHECK(x.grad()[0].equal(torch::zeros({2, 5, 4})));
}

TEST_CASE("a sink takes no gradient from a NaN of a query without keys, nor where there are no keys at all") {
  for (const int64_t keys : {0, 3}) {
    const Tensor q = torch::zeros({1, 1, 2, 4}), k = torch::zeros({1, 1, keys, 4}),
                 sink = torch::ones({1}).requires_grad_();
    const auto none = AttentionOptions().key_lengths(torch::zeros({1}, torch::kLong));
    for (const auto& options : {keys == 0 ? AttentionOptions() : none, none}) {
      const auto [output, lse] =
          attention_with_lse(q, k, k, AttentionOptions(options).sink(sink).backend(AttentionBackend::chunked));
      const Tensor grad_output = torch::full({1, 1, 2, 4}, std::nan(""));
      const Tensor grad = torch::autograd::grad({output, lse}, {sink}, {grad_output, torch::ones_like(lse)})[0];
      CHECK(grad.item<double>() == 2);  // of both log-sum-exps
    }
  }
}

TEST_CASE("chunked attention never asks for L x L elements") {
  const int64_t length = 4096;
  torch::manual_seed(8);
  const auto make = [&] { return torch::randn({1, 2, length, 16}).requires_grad_(); };
  const Tensor q = make(), k = make(), v = make();
  using O = AttentionOptions;
  const std::pair<std::string, O> requests[] = {
      {"plain", O()},
      {"causal", O().causal(true)},
      {"key lengths, softcap", O().key_lengths(torch::tensor({3000})).softcap(10)},
      {"relative bias", O().relative_bias(torch::randn({2, 2 * length - 1}).requires_grad_())},
      {"alibi", O().alibi_slopes(torch::rand({2, 1}).requires_grad_())},
      {"bias of keys", O().bias(torch::randn({2, 1, length}).requires_grad_())},
      {"mask of keys", O().mask(torch::rand({length}) > 0.5)},
      {"block mask", O().block_mask(torch::rand({32, 32}) > 0.5)},
      {"dropout", O().dropout(0.1)},
  };
  MemoryMeter meter;
  for (const auto& [name, options] : requests) {
    INFO(name);
    const MemoryReport report =
        meter.measure([&] { attention(q, k, v, O(options).backend(AttentionBackend::chunked)).sum().backward(); });
    CHECK(*report.largest < length * length);  // bytes: not even one bool for each score
    CHECK(report.added_peak() < 6 * 2 * 1024 * 1024 * 4 + 16 * length * 2 * 16 * 4);  // six chunks and O(L)
  }
}

TEST_CASE("a window makes chunked attention skip what no query sees") {
  const int64_t length = 16384;
  torch::manual_seed(9);
  const Tensor q = torch::randn({1, 1, length, 8}).requires_grad_(), k = torch::randn({1, 1, length, 8}),
               v = torch::randn({1, 1, length, 8});
  const auto options = AttentionOptions().window(AttentionWindow{100, 0}).backend(AttentionBackend::chunked);
  MemoryMeter meter;
  Tensor output, causal;
  const auto windowed = meter.measure([&] { output = attention(q, k, v, options); });
  const auto all = meter.measure(
      [&] { causal = attention(q, k, v, AttentionOptions().causal(true).backend(AttentionBackend::chunked)); });
  CHECK(2 * windowed.allocations < all.allocations);  // 2 tiles, with both ends masked, instead of 1 to 16
  // The last query by hand
  const Tensor scores = torch::matmul(k[0][0].slice(0, length - 101), q.detach()[0][0][length - 1]) / std::sqrt(8.0);
  CHECK(largest(output.detach()[0][0][length - 1] - torch::matmul(scores.softmax(0), v[0][0].slice(0, length - 101))) <
        1e-5);
}

TEST_CASE("second derivatives of chunked attention are refused, those of the reference are right") {
  torch::manual_seed(10);
  const Tensor q = torch::randn({1, 1, 4, 2}, torch::kDouble).requires_grad_(),
               bias = torch::randn({4, 4}, torch::kDouble).requires_grad_();
  const auto gradient = [&](AttentionBackend backend, const Tensor& x, const Tensor& by) {
    const auto options = AttentionOptions().bias(bias).backend(backend);
    return torch::autograd::grad({attention(x, x, x, options).square().sum()}, {by}, {}, true,
                                 /*create_graph=*/true)[0];
  };
  CHECK(error_of([&] { gradient(AttentionBackend::chunked, q, q).sum().backward(); }).id() ==
        "headroom.attention.double_backward");
  CHECK(error_of([&] { gradient(AttentionBackend::chunked, q.detach(), bias).sum().backward(); }).id() ==
        "headroom.attention.double_backward");
  const Tensor second = torch::autograd::grad({gradient(AttentionBackend::reference, q, q).sum()}, {q})[0];
  const Tensor step = torch::ones_like(q) * 1e-5;
  const auto at = [&](const Tensor& x) {
    const Tensor leaf = x.detach().requires_grad_();
    return gradient(AttentionBackend::reference, leaf, leaf).detach();
  };
  CHECK(largest(second - (at(q + step) - at(q - step)) / 2e-5) < 1e-8);
}

TEST_CASE("attention weights are the reference's, whole and as means, with gradients, for every request") {
  for (const AttentionCase& request : attention_cases()) {
    INFO(request.name);
    AttentionOptions options = request.options;
    options.dropout(0);
    std::vector<Tensor> leaves{request.q.detach().requires_grad_(), request.k.detach().requires_grad_()};
    for (std::optional<Tensor>* x :
         {&options.bias(), &options.relative_bias(), &options.alibi_slopes(), &options.sink()}) {
      if (x->has_value()) leaves.push_back(*(*x = (*x)->detach().requires_grad_()));
    }
    const Tensor &q = leaves[0], &k = leaves[1];
    std::vector<int64_t> sizes = k.sizes().vec();
    sizes.back() = k.size(-2);
    const Tensor whole = attention(q, k, torch::eye(k.size(-2), torch::kDouble).expand(sizes),
                                   AttentionOptions(options).backend(AttentionBackend::reference));
    for (const bool mean : {false, true}) {
      const Tensor ours = attention_weights(q, k, options, mean),
                   expected = mean ? whole.sum(-3) / std::max<int64_t>(q.size(-3), 1) : whole;
      REQUIRE(ours.sizes() == expected.sizes());
      if (ours.numel() == 0) continue;
      CHECK(largest(ours - expected) < 1e-12);
      const Tensor grad = torch::cos(torch::arange(ours.numel(), torch::kDouble) * 1.7).view(ours.sizes());
      const auto our_grads = torch::autograd::grad({ours}, leaves, {grad}),
                 expected_grads = torch::autograd::grad({expected}, leaves, {grad}, /*retain_graph=*/true);
      for (size_t i = 0; i < leaves.size(); ++i) {
        CAPTURE(i);
        CHECK(largest(our_grads[i] - expected_grads[i]) < 1e-11);
      }
    }
  }
}
