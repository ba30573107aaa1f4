#include "headroom/attention.hpp"

#include "headroom/memory.hpp"
#include "support/attention_requests.hpp"

using namespace headroom;
using namespace headroom::testing;

namespace {

struct Inputs {
  Tensor q, k, v, grad;
  Inputs(at::IntArrayRef q_shape, at::IntArrayRef k_shape, at::IntArrayRef v_shape, torch::ScalarType dtype) {
    const auto make = [&](at::IntArrayRef shape) { return torch::randn(shape, torch::kDouble).to(dtype); };
    q = make(q_shape), k = make(k_shape), v = make(v_shape);
    std::vector<int64_t> out = q_shape.vec();
    out.back() = v_shape.back();
    grad = make(out);
  }
};

struct Result {
  Tensor output, q, k, v;
};
Result run(const Inputs& in, const AttentionOptions& options, torch::ScalarType dtype,
           const testing::AttentionForm& form = attention_with_lse) {
  Tensor q = in.q.to(dtype).detach().requires_grad_(), k = in.k.to(dtype).detach().requires_grad_(),
         v = in.v.to(dtype).detach().requires_grad_();
  const Tensor output = form(q, k, v, options).output;
  output.backward(in.grad.to(dtype));
  return {output.detach(), q.grad(), k.grad(), v.grad()};
}

/// The tiled backend in `dtype` against the reference in double, by the yardstick of the reference in `dtype`.
void check_against_reference(const Inputs& in, AttentionOptions options, torch::ScalarType dtype = torch::kFloat) {
  const Result tiled = run(in, options.backend(AttentionBackend::tiled), dtype);
  const Result naive = run(in, options, dtype, testing::naive_attention);
  const Result exact = run(in, options.backend(AttentionBackend::reference), torch::kDouble);
  const auto compare = [&](const Tensor& ours, const Tensor& theirs, const Tensor& truth) {
    REQUIRE(ours.sizes() == truth.sizes());
    REQUIRE(ours.scalar_type() == dtype);
    CHECK(rms(ours - truth) <= 2 * rms(theirs - truth));
    CHECK(largest(ours - truth) <= 4 * largest(theirs - truth));
  };
  compare(tiled.output, naive.output, exact.output);
  compare(tiled.q, naive.q, exact.q);
  compare(tiled.k, naive.k, exact.k);
  compare(tiled.v, naive.v, exact.v);
}

}  // namespace

TEST_CASE("tiled attention and its gradients against the reference in double") {
  torch::manual_seed(1);
  const Inputs in({2, 3, 150, 16}, {2, 3, 120, 16}, {2, 3, 120, 24}, torch::kFloat);
  check_against_reference(in, {});
  check_against_reference(in, AttentionOptions().causal(true));
  check_against_reference(in, AttentionOptions().scale(0.7));
  check_against_reference(in, AttentionOptions().key_lengths(torch::tensor({120, 33})));
  check_against_reference(in, AttentionOptions().causal(true).key_lengths(torch::tensor({5, 90}, torch::kInt)));
}

TEST_CASE("any number of batch dimensions, whatever their strides") {
  torch::manual_seed(2);
  check_against_reference(Inputs({3, 100, 16}, {3, 90, 16}, {3, 90, 16}, torch::kFloat), {});
  check_against_reference(Inputs({2, 5, 3, 60, 16}, {2, 5, 3, 60, 16}, {2, 5, 3, 60, 16}, torch::kFloat),
                          AttentionOptions().key_lengths(torch::tensor({{60}, {17}})));
  // [B,T,F,H,D] attended along T: batch dimensions (B,F) that no single stride steps through
  const Inputs in({2, 40, 7, 3, 16}, {2, 40, 7, 3, 16}, {2, 40, 7, 3, 16}, torch::kFloat);
  const auto along_time = [](const Tensor& x) { return x.permute({0, 2, 3, 1, 4}); };
  const Tensor q = along_time(in.q), k = along_time(in.k), v = along_time(in.v);
  const Tensor strided = attention(q, k, v);
  CHECK(strided.equal(attention(q.contiguous(), k.contiguous(), v.contiguous())));
  // the output lies in the order of q, so that permuting back gives a dense tensor
  CHECK(strided.permute({0, 3, 1, 2, 4}).is_contiguous());
}

TEST_CASE("transposed, sliced and expanded inputs give the bits of dense ones") {
  torch::manual_seed(3);
  const Tensor base = torch::randn({2, 33, 4, 40});
  const Tensor q = base.transpose(1, 2).slice(-1, 0, 40, 2);                                   // [2,4,33,20]
  const Tensor k = torch::randn({20, 50, 4, 1}).permute({3, 2, 1, 0}).expand({2, 4, 50, 20});  // a broadcast batch
  const Tensor v = torch::randn({2, 4, 20, 50}).transpose(-2, -1);
  const auto gradients = [](Tensor a, Tensor b, Tensor c) {
    a = a.detach().requires_grad_(), b = b.detach().requires_grad_(), c = c.detach().requires_grad_();
    const Tensor output = attention(a, b, c);
    output.square().sum().backward();
    return std::vector<Tensor>{output.detach(), a.grad(), b.grad(), c.grad()};
  };
  const auto strided = gradients(q, k, v), dense = gradients(q.contiguous(), k.contiguous(), v.contiguous());
  for (size_t i = 0; i < dense.size(); ++i) CHECK(strided[i].equal(dense[i]));
}

TEST_CASE("the log-sum-exp is returned, is differentiable, and is -inf without keys") {
  torch::manual_seed(4);
  const Tensor q = torch::randn({2, 2, 20, 8}).requires_grad_(), k = torch::randn({2, 2, 30, 8}),
               v = torch::randn({2, 2, 30, 8});
  const AttentionResult result = attention_with_lse(q, k, v, AttentionOptions().key_lengths(torch::tensor({30, 0})));
  CHECK(result.lse.requires_grad());
  CHECK(result.lse.scalar_type() == torch::kFloat);
  const Tensor scores = torch::matmul(q, k.transpose(-2, -1)).detach() / std::sqrt(8.0);
  CHECK(largest(result.lse[0] - scores[0].logsumexp(-1)) < 1e-5);
  const auto reference = attention_with_lse(
      q, k, v, AttentionOptions().key_lengths(torch::tensor({30, 0})).backend(AttentionBackend::reference));
  CHECK(largest(result.lse[0] - reference.lse[0]) < 1e-6);
  CHECK(result.lse[1].equal(reference.lse[1]));
  CHECK(result.lse[1].equal(torch::full({2, 20}, -std::numeric_limits<float>::infinity())));
  CHECK(result.output[1].equal(torch::zeros({2, 20, 8})));
  result.output.sum().backward();
  CHECK(q.grad()[1].equal(torch::zeros({2, 20, 8})));
}

TEST_CASE("double is computed in double; bfloat16 in float") {
  torch::manual_seed(5);
  const Inputs in({1, 2, 70, 16}, {1, 2, 70, 16}, {1, 2, 70, 16}, torch::kDouble);
  const Result tiled = run(in, AttentionOptions().backend(AttentionBackend::tiled), torch::kDouble);
  const Result exact = run(in, AttentionOptions().backend(AttentionBackend::reference), torch::kDouble);
  CHECK(largest(tiled.output - exact.output) < 1e-14);
  CHECK(largest(tiled.q - exact.q) < 1e-14);
  const Inputs narrow({1, 2, 70, 16}, {1, 2, 70, 16}, {1, 2, 70, 16}, torch::kBFloat16);
  check_against_reference(narrow, {}, torch::kBFloat16);
}

TEST_CASE("the gradients agree with finite differences") {
  torch::manual_seed(6);
  const Inputs in({1, 2, 5, 3}, {1, 2, 4, 3}, {1, 2, 4, 2}, torch::kDouble);
  const Result analytic = run(in, AttentionOptions().causal(true), torch::kDouble);
  const auto loss = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    return (attention(q, k, v, AttentionOptions().causal(true)) * in.grad).sum().item<double>();
  };
  const Tensor point[] = {in.q, in.k, in.v}, gradient[] = {analytic.q, analytic.k, analytic.v};
  for (int input = 0; input < 3; ++input) {
    for (int64_t i = 0; i < point[input].numel(); ++i) {
      const auto shifted = [&](double by) {
        Tensor x[] = {in.q, in.k, in.v};
        x[input] = x[input].clone();
        x[input].view(-1)[i] += by;
        return loss(x[0], x[1], x[2]);
      };
      CHECK(gradient[input].reshape(-1)[i].item<double>() ==
            Approx((shifted(1e-6) - shifted(-1e-6)) / 2e-6).margin(1e-8));
    }
  }
}

TEST_CASE("second derivatives are refused, not wrong") {
  const Tensor q = torch::randn({1, 1, 4, 2}).requires_grad_();
  const Tensor gradient = torch::autograd::grad({attention(q, q, q).sum()}, {q}, {}, true, /*create_graph=*/true)[0];
  const Error error = testing::error_of([&] { gradient.sum().backward(); });
  CHECK(error.id() == "headroom.attention.double_backward");
  CHECK(testing::contains(error.what(), "create_graph"));
}

TEST_CASE("forward and backward allocate what they return, and a workspace that does not grow with the scores") {
  const int64_t heads = 3, length = 600, dim = 16;
  const int64_t tensor_bytes = heads * length * dim * 4, lse_bytes = heads * length * 8;
  const int64_t workspace = at::get_num_threads() * (1 << 20);
  const auto make = [&] { return torch::randn({1, heads, length, dim}); };
  const Tensor q = make().requires_grad_(), k = make().requires_grad_(), v = make().requires_grad_(), grad = make();
  MemoryMeter meter;
  Tensor output;
  const MemoryReport forward = meter.measure([&] { output = attention(q, k, v); });
  CHECK(forward.held() == tensor_bytes + lse_bytes);
  CHECK(forward.added_peak() <= tensor_bytes + lse_bytes + workspace);
  const MemoryReport backward = meter.measure([&] { output.backward(grad); });
  CHECK(backward.added_peak() <= 3 * tensor_bytes + heads * length * 4 + workspace);
  CHECK(std::max(*forward.largest, *backward.largest) < length * length * 4);
}

TEST_CASE("requests that do not fit are refused with what was given") {
  const Tensor q = torch::randn({2, 3, 8, 4});
  const auto error = [&](const Tensor& k, const Tensor& v, const AttentionOptions& options = {}) {
    return testing::error_of([&] { attention(q, k, v, options); });
  };
  CHECK(error(torch::randn({2, 3, 8, 5}), q).id() == "headroom.attention.shape");
  CHECK(testing::contains(error(torch::randn({2, 3, 8, 5}), q).what(), "[2, 3, 8, 5]"));
  CHECK(error(torch::randn({2, 1, 8, 4}), q).id() == "headroom.attention.shape");
  CHECK(error(q, torch::randn({2, 3, 9, 4})).id() == "headroom.attention.shape");
  CHECK(error(torch::randn({3, 8, 4}), q).id() == "headroom.attention.shape");
  CHECK(error(q.to(torch::kDouble), q).id() == "headroom.attention.dtype");
  CHECK(error(q, q.to(torch::kMeta)).id() == "headroom.attention.dtype");
  CHECK(error(Tensor(), q).id() == "headroom.attention.shape");
  CHECK(error(q, q, AttentionOptions().scale(std::nan(""))).id() == "headroom.attention.scale");
  const auto lengths_error = [&](const Tensor& lengths) {
    return error(q, q, AttentionOptions().key_lengths(lengths));
  };
  CHECK(lengths_error(torch::tensor({8, 9})).id() == "headroom.attention.key_lengths");
  CHECK(testing::contains(lengths_error(torch::tensor({8, 9})).what(), "contains 9"));
  CHECK(lengths_error(torch::tensor({8, -1})).id() == "headroom.attention.key_lengths");
  CHECK(lengths_error(torch::tensor({8, 8, 8})).id() == "headroom.attention.key_lengths");
  CHECK(lengths_error(torch::tensor({8.0, 8.0})).id() == "headroom.attention.key_lengths");
  CHECK(testing::error_of([&] {
          const Tensor meta = q.to(torch::kMeta);
          attention(meta, meta, meta, AttentionOptions().backend(AttentionBackend::tiled));
        }).id() == "headroom.attention.backend");
}
