#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "headroom/attention.hpp"
#include "support/catch.hpp"

namespace headroom::testing {

using torch::Tensor;

/// A named request with inputs small enough for the reference and not divisible by anything. All in double.
struct AttentionCase {
  std::string name;
  Tensor q, k, v;
  AttentionOptions options;
  bool bias_has_gradient = true;
};

/// The request in another dtype: q, k, v and what is added to scores.
inline AttentionCase converted(const AttentionCase& request, torch::ScalarType dtype) {
  AttentionCase result = request;
  const auto convert = [&](std::optional<Tensor>& x) {
    if (x.has_value()) x = x->to(dtype);
  };
  for (Tensor* x : {&result.q, &result.k, &result.v}) *x = x->to(dtype);
  convert(result.options.bias()), convert(result.options.relative_bias());
  convert(result.options.alibi_slopes()), convert(result.options.sink()), convert(result.options.polar_phase());
  return result;
}

/// The request with every tensor that is computed with on a device; lengths and starts stay on the CPU.
inline AttentionCase moved(const AttentionCase& request, torch::Device device) {
  AttentionCase result = request;
  AttentionOptions& o = result.options;
  for (Tensor* x : {&result.q, &result.k, &result.v}) *x = x->to(device);
  for (std::optional<Tensor>* x : {&o.mask(), &o.hidden(), &o.block_mask(), &o.bias(), &o.relative_bias(),
                                   &o.alibi_slopes(), &o.sink(), &o.rotary(), &o.polar(), &o.polar_phase()}) {
    if (x->has_value()) *x = (*x)->to(device);
  }
  return result;
}

/// Output, log-sum-exp, and gradients of q, k, v, bias, relative_bias, alibi_slopes, sink, polar_phase where given.
struct AttentionValues {
  std::vector<std::string> names;
  std::vector<Tensor> values;
};

/// The definition in the dtype of the inputs, every step rounded to it: what errors are measured by. (The backend
/// reference computes 16 bits in float.)
inline AttentionResult naive_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const AttentionOptions& options) {
  const auto request = headroom::detail::AttentionRequest::check(q, k, v, options);
  const auto result =
      headroom::detail::reference_attention({q, k, v, request}, /*with_lse=*/true, /*dtype=*/q.scalar_type());
  return {result.output, result.lse};
}

using AttentionForm =
    std::function<AttentionResult(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions&)>;

/// Runs a request and differentiates the sum of output and log-sum-exp times fixed noise. Where `with_lse` is false,
/// the log-sum-exp is neither compared nor differentiated.
inline AttentionValues run_case(const AttentionCase& request, const AttentionForm& form, bool with_lse = true) {
  AttentionCase leaf = request;
  AttentionValues result;
  std::vector<Tensor> leaves;
  const auto make_leaf = [&](const std::string& name, Tensor& x) {
    x = x.detach().requires_grad_();
    result.names.push_back("gradient of " + name);
    leaves.push_back(x);
  };
  make_leaf("q", leaf.q), make_leaf("k", leaf.k), make_leaf("v", leaf.v);
  const auto make_optional_leaf = [&](const std::string& name, std::optional<Tensor>& x) {
    if (x.has_value()) make_leaf(name, *x);
  };
  if (leaf.bias_has_gradient) make_optional_leaf("bias", leaf.options.bias());
  make_optional_leaf("relative_bias", leaf.options.relative_bias());
  make_optional_leaf("alibi_slopes", leaf.options.alibi_slopes()), make_optional_leaf("sink", leaf.options.sink());
  make_optional_leaf("polar_phase", leaf.options.polar_phase());
  if (leaf.options.dropout() > 0) torch::manual_seed(17);
  const auto [output, lse] = form(leaf.q, leaf.k, leaf.v, leaf.options);
  const auto noise = [](const Tensor& x) {
    return torch::cos(torch::arange(x.numel(), torch::kDouble) * 1.7).view(x.sizes()).to(x.options());
  };
  Tensor loss = (output * noise(output)).sum();
  const Tensor visible = lse.detach() != -std::numeric_limits<double>::infinity();
  if (with_lse) loss = loss + (lse.masked_fill(visible.logical_not(), 0) * noise(lse)).sum().to(loss.scalar_type());
  result.values = torch::autograd::grad({loss}, leaves);
  result.names.push_back("output"), result.values.push_back(output.detach());
  if (with_lse) result.names.push_back("lse"), result.values.push_back(lse.detach());
  return result;
}

inline AttentionValues run_case(const AttentionCase& request, AttentionBackend backend, bool with_lse = true) {
  const AttentionForm form = [&](const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
    return attention_with_lse(q, k, v, AttentionOptions(options).backend(backend));
  };
  return run_case(request, form, with_lse);
}

/// Every option alone, and combinations.
inline std::vector<AttentionCase> attention_cases() {
  torch::manual_seed(11);
  const auto real = torch::kDouble;
  const auto noise = [&](at::IntArrayRef shape) { return torch::randn(shape, real); };
  std::vector<AttentionCase> cases;
  const auto add = [&](const std::string& name, at::IntArrayRef q, at::IntArrayRef k, at::IntArrayRef v,
                       const AttentionOptions& options) {
    cases.push_back({name, noise(q), noise(k), noise(v), options, true});
  };
  const auto plain = [&](const std::string& name, const AttentionOptions& options) {
    add(name, {2, 4, 37, 6}, {2, 4, 53, 6}, {2, 4, 53, 5}, options);
  };
  const Tensor mask = torch::rand({2, 4, 37, 53}) > 0.3;
  const Tensor blocks = torch::rand({2, 4, 4, 6}) > 0.5;  // of 10 x 10
  const Tensor starts = torch::tensor({0, 5, 5, 20, 37}), key_starts = torch::tensor({0, 9, 11, 11, 53});
  const auto table = [](int64_t rows, int64_t pairs) {
    const Tensor angles = torch::rand({rows, pairs}, torch::kDouble) * 6;
    return torch::polar(torch::ones_like(angles), angles);
  };
  const auto turns = [](int64_t rows, int64_t features) {
    const Tensor angles = torch::rand({rows, features}, torch::kDouble) * 6;
    return torch::cat({angles.cos(), angles.sin()}, -1);
  };
  using O = AttentionOptions;
  plain("plain", O());
  plain("scale", O().scale(-0.7));
  plain("causal", O().causal(true));
  plain("causal, bottom right", O().causal(true).query_offset(16));
  plain("causal, queries before the keys", O().causal(true).query_offset(-10));
  plain("window", O().window(AttentionWindow{7, 3}));
  plain("window to the left", O().window(AttentionWindow{4, -1}).query_offset(20));
  plain("window beyond the keys", O().window(AttentionWindow{2, 2}).query_offset(40));
  plain("window and global keys", O().window(AttentionWindow{4, 2}).global_keys(3));
  plain("causal window and global keys, queries further on",
        O().window(AttentionWindow{4, -1}).global_keys(6).causal(true).query_offset(20));
  plain("global keys of packed sequences", O().sequence_starts(starts)
                                               .key_sequence_starts(key_starts)
                                               .window(AttentionWindow{1, 1})
                                               .global_keys(2)
                                               .key_lengths(torch::tensor({53, 12})));
  plain("more global keys than keys", O().window(AttentionWindow{1, 1}).global_keys(1000));
  plain("global keys without a window", O().causal(true).global_keys(2));
  plain("key lengths", O().key_lengths(torch::tensor({53, 17})));
  plain("key lengths of none", O().key_lengths(torch::tensor({0, 53})));
  plain("sequences", O().sequence_starts(starts).key_sequence_starts(key_starts));
  add("sequences of queries and keys", {1, 2, 37, 6}, {1, 2, 37, 6}, {1, 2, 37, 6}, O().sequence_starts(starts));
  plain("causal sequences", O().sequence_starts(starts).key_sequence_starts(key_starts).causal(true).query_offset(2));
  plain("mask", O().mask(mask));
  plain("mask of keys", O().mask(torch::rand({53}) > 0.5));
  plain("mask of batches", O().mask(torch::tensor({true, false}).view({2, 1, 1, 1})));
  plain("hidden", O().hidden(mask.select(1, 0).unsqueeze(1)));
  plain("block mask", O().block_mask(blocks).block_size(10));
  plain("block mask for all heads", O().block_mask(blocks[0][1]).block_size(10).causal(true));
  plain("bias", O().bias(noise({2, 4, 37, 53})));
  plain("bias of heads", O().bias(noise({4, 37, 53})));
  plain("bias of keys", O().bias(noise({2, 1, 1, 53})));
  plain("bias of queries", O().bias(noise({37, 1})));
  plain("bias for all", O().bias(noise({})));
  plain("bias that hides",
        O().bias(noise({37, 53}).masked_fill(mask[0][0], -INFINITY).index_fill(0, torch::tensor({3}), -INFINITY)));
  plain("relative bias", O().relative_bias(noise({4, 2 * 60 - 1})));
  plain("relative bias for all heads", O().relative_bias(noise({1, 2 * 8 - 1})).query_offset(5));
  plain("relative bias in sequences",
        O().relative_bias(noise({4, 2 * 8 - 1})).sequence_starts(starts).key_sequence_starts(key_starts));
  plain("alibi", O().alibi_slopes(noise({4, 1}).abs() * 0.1));
  plain("slopes of queries", O().alibi_slopes(noise({2, 4, 37}).abs() * 0.1).query_offset(-3));
  plain("sink", O().sink(noise({4})));
  plain("sink, keys hidden", O().sink(noise({4})).key_lengths(torch::tensor({0, 20})));
  plain("softcap", O().softcap(0.8));
  plain("rotary", O().rotary(table(53, 3)));
  plain("rotary of some features", O().rotary(table(60, 2)).query_offset(16).causal(true));
  plain("rotary in sequences", O().rotary(table(42, 3)).sequence_starts(starts).key_sequence_starts(key_starts));
  plain("polar", O().polar(turns(53, 6)));
  plain("polar with phases", O().polar(turns(70, 6)).polar_phase(noise({4, 6})).query_offset(16).causal(true));
  plain("polar in sequences",
        O().polar(turns(42, 6)).polar_phase(noise({4, 6})).sequence_starts(starts).key_sequence_starts(key_starts));
  plain("dropout", O().dropout(0.3));
  add("grouped heads", {2, 6, 37, 6}, {2, 2, 53, 6}, {2, 2, 53, 5}, O());
  add("one head of keys", {2, 6, 37, 6}, {1, 1, 53, 6}, {1, 1, 53, 5}, O().causal(true).bias(noise({6, 37, 53})));
  add("broadcast batch of keys", {3, 2, 37, 6}, {1, 2, 53, 6}, {1, 2, 53, 5}, O().window(AttentionWindow{9, 9}));
  add("three dimensions", {4, 37, 6}, {2, 53, 6}, {2, 53, 5},
      O().key_lengths(torch::tensor(30)).bias(noise({37, 53})).sink(noise({4})));
  add("five dimensions", {2, 3, 4, 17, 6}, {2, 1, 2, 23, 6}, {2, 1, 2, 23, 5},
      O().key_lengths(torch::tensor({{23, 5, 0}}))
          .bias(noise({2, 1, 4, 17, 23}))
          .mask(mask[0][0].narrow(0, 0, 17).narrow(1, 0, 23)));
  add("six dimensions", {2, 2, 3, 2, 7, 6}, {1, 2, 1, 2, 9, 6}, {1, 2, 1, 2, 9, 5},
      O().dropout(0.2).alibi_slopes(noise({2, 1, 3, 2, 7}).abs()));
  plain("softcap with all that is added", O().softcap(1.5)
                                              .bias(noise({4, 37, 53}))
                                              .relative_bias(noise({4, 9}))
                                              .alibi_slopes(noise({4, 1}).abs())
                                              .sink(noise({4}))
                                              .causal(true)
                                              .query_offset(16)
                                              .dropout(0.25));
  plain("every mask", O().causal(true)
                          .query_offset(9)
                          .window(AttentionWindow{20, 1})
                          .key_lengths(torch::tensor({40, 53}))
                          .mask(mask)
                          .block_mask(blocks)
                          .block_size(10)
                          .sink(noise({4})));
  const auto everything = [&] {
    return O()
        .softcap(2)
        .bias(noise({1, 4, 37, 37}))
        .relative_bias(noise({1, 21}))
        .alibi_slopes(noise({4, 37}).abs() * 0.2)
        .sink(noise({4}))
        .sequence_starts(starts)
        .dropout(0.1)
        .key_lengths(torch::tensor({37, 30}));
  };
  add("grouped heads with everything", {2, 4, 37, 6}, {2, 2, 37, 6}, {2, 2, 37, 5},
      everything().scale(0.3).causal(true).window(AttentionWindow{6, -1}).rotary(table(40, 3)));
  add("grouped heads with polar positions and everything", {2, 4, 37, 6}, {1, 2, 37, 6}, {1, 2, 37, 5},
      everything()
          .scale(-0.3)
          .window(AttentionWindow{6, 2})
          .global_keys(2)
          .polar(turns(40, 6))
          .polar_phase(noise({2, 6})));
  add("polar positions in five dimensions", {2, 3, 4, 17, 6}, {2, 1, 2, 23, 6}, {2, 1, 2, 23, 5},
      O().polar(turns(23, 6)).polar_phase(noise({2, 6})).key_lengths(torch::tensor({{23, 5, 0}})));
  add("no queries", {2, 4, 0, 6}, {2, 4, 5, 6}, {2, 4, 5, 5}, O());
  add("no keys", {2, 4, 5, 6}, {2, 4, 0, 6}, {2, 4, 0, 5}, O());
  add("no keys but a sink", {2, 4, 5, 6}, {2, 4, 0, 6}, {2, 4, 0, 5}, O().sink(noise({4})));
  add("no batches", {0, 4, 5, 6}, {0, 4, 7, 6}, {0, 4, 7, 5}, O().causal(true));
  add("no batches, keys for all", {0, 4, 5, 6}, {1, 4, 7, 6}, {1, 4, 7, 5}, O().bias(noise({5, 7})));
  add("no heads", {2, 0, 5, 6}, {2, 0, 7, 6}, {2, 0, 7, 5}, O().bias(noise({5, 7})));
  add("no values", {2, 4, 5, 6}, {2, 4, 7, 6}, {2, 4, 7, 0}, O().causal(true).bias(noise({5, 7})));
  add("no features", {2, 4, 5, 0}, {2, 4, 7, 0}, {2, 4, 7, 3}, O().causal(true));
  plain("everything of positions in sequences aligned bottom right",
        O().sequence_starts(starts)
            .key_sequence_starts(torch::tensor({0, 9, 14, 30, 53}))
            .alignment(AttentionAlignment::bottom_right)
            .query_offset(1)
            .window(AttentionWindow{9, 0})
            .alibi_slopes(noise({4, 1}).abs() * 0.1)
            .relative_bias(noise({4, 2 * 8 - 1}))
            .rotary(table(60, 2)));
  plain("causal, aligned bottom right", O().causal(true).alignment(AttentionAlignment::bottom_right));
  return cases;
}

inline double largest(const Tensor& x) { return x.numel() == 0 ? 0 : x.to(torch::kDouble).abs().max().item<double>(); }
inline double rms(const Tensor& x) {
  return x.numel() == 0 ? 0 : x.to(torch::kDouble).square().mean().sqrt().item<double>();
}

/// CHECKs that two runs agree to `tolerance`, -inf included.
inline void check_same(const AttentionValues& given, const AttentionValues& expected, double tolerance) {
  REQUIRE(given.names == expected.names);
  for (size_t i = 0; i < given.names.size(); ++i) {
    INFO(given.names[i]);
    REQUIRE(given.values[i].sizes() == expected.values[i].sizes());
    REQUIRE(given.values[i].scalar_type() == expected.values[i].scalar_type());
    const Tensor same = given.values[i] == expected.values[i];  // infinities
    CHECK(largest((given.values[i] - expected.values[i]).masked_fill(same, 0)) <= tolerance);
  }
}

/// The rule for errors in a narrow dtype: against the reference in double, at most twice (RMS) and four times (largest)
/// those of the reference in that dtype. CHECKed tensor by tensor; errors of tensors of a few numbers, which make no
/// statistic, are pooled and CHECKed at the end.
class AccuracyRule {
 public:
  AccuracyRule(AttentionBackend backend, torch::ScalarType dtype) : backend_(backend), dtype_(dtype) {}
  ~AccuracyRule() {
    INFO("gradients of less than 64 numbers");
    if (!ours_.empty()) check(torch::cat(ours_), torch::cat(naive_));
  }

  void check(const AttentionCase& request, bool gradients = true) {
    const AttentionCase narrow = converted(request, dtype_);
    const AttentionValues ours = run_case(narrow, backend_, /*with_lse=*/false);
    const AttentionValues naive = run_case(narrow, naive_attention, /*with_lse=*/false);
    const AttentionValues exact = run_case(converted(narrow, torch::kDouble), AttentionBackend::reference, false);
    for (size_t i = 0; i < exact.names.size(); ++i) {
      INFO(exact.names[i]);
      if (!gradients && exact.names[i] != "output") continue;
      REQUIRE(ours.values[i].sizes() == exact.values[i].sizes());
      REQUIRE(ours.values[i].scalar_type() == dtype_);
      const Tensor our_error = ours.values[i] - exact.values[i], naive_error = naive.values[i] - exact.values[i];
      if (exact.values[i].numel() >= 64) {
        check(our_error, naive_error);
      } else if (const double size = rms(exact.values[i]); size > 1e-12) {  // else 0 but for rounding: no measure
        ours_.push_back(our_error.flatten() / size), naive_.push_back(naive_error.flatten() / size);
      }
    }
  }

 private:
  static void check(const Tensor& ours, const Tensor& naive) {
    CHECK(rms(ours) <= 2 * rms(naive));
    CHECK(largest(ours) <= 4 * largest(naive));
  }

  AttentionBackend backend_;
  torch::ScalarType dtype_;
  std::vector<Tensor> ours_, naive_;
};

}  // namespace headroom::testing
