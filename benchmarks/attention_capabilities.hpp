#pragma once

#include <functional>
#include <string>
#include <vector>

#include "attention_step.hpp"

namespace headroom::benchmarks {

struct AttentionCapability {
  std::string name;
  std::function<AttentionStep(const AttentionSizes&)> make;
};

/// Everything that attention can be asked for, one at a time.
class AttentionCapabilities {
 public:
  using S = AttentionSizes;
  using O = AttentionOptions;

  AttentionCapabilities() {
    add_options();
    add_shapes();
    add_dtypes();
  }
  const std::vector<AttentionCapability>& all() const { return all_; }

 private:
  static AttentionStep of_shape(const S& s) {
    return {torch::randn(s.shape()), torch::randn(s.shape()), torch::randn(s.shape())};
  }
  static Tensor learned(at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); }
  static O polar(const S& s) {
    const Tensor angles = torch::rand({s.length, s.head_dim}) * 6;
    return O()
        .polar(torch::cat({angles.cos(), angles.sin()}, -1))
        .polar_phase(torch::rand({s.heads, s.head_dim}).requires_grad_());
  }
  static O rotary(const S& s) {
    const Tensor angles = torch::rand({s.length, s.head_dim / 2});
    return O().rotary(torch::polar(torch::ones_like(angles), angles));
  }

  void add(const std::string& name, const std::function<AttentionStep(const S&)>& make) {
    all_.push_back({name, [make](const S& s) { return make(s).prepare(); }});
  }
  void add_option(const std::string& name, const std::function<O(const S&)>& options) {
    add(name, [=](const S& s) {
      AttentionStep step = of_shape(s);
      step.options = options(s);
      return step;
    });
  }
  void add_shape(const std::string& name, const std::function<void(AttentionStep&, const S&)>& change) {
    add(name, [=](const S& s) {
      AttentionStep step = of_shape(s);
      change(step, s);
      return step;
    });
  }
  void add_dtype(const std::string& name, torch::ScalarType dtype, const std::function<O(const S&)>& options) {
    add(name, [=](const S& s) {
      AttentionStep step = of_shape(s);
      for (Tensor* x : {&step.q, &step.k, &step.v}) *x = x->to(dtype);
      step.options = options(s);
      return step;
    });
  }

  void add_options() {
    add_option("plain", [](const S&) { return O(); });
    add_option("causal", [](const S&) { return O().causal(true); });
    add_option("window", [](const S&) { return O().window(AttentionWindow{128, 128}); });
    add_option("window and global keys", [](const S&) {
      return O().window(AttentionWindow{128, 128}).global_keys(16);
    });
    add_option("score function, gradient of its table", [](const S& s) {
      return O().score_function(ScoreFunction(
          [](auto score, auto at, auto table) { return score + score * table(at.head, at.distance + 99); },
          learned({s.heads, 199})));
    });
    add_option("key lengths",
               [](const S& s) { return O().key_lengths(torch::full({s.batch}, s.length / 2, torch::kLong)); });
    add_option("packed sequences", [](const S& s) {
      return O().sequence_starts(torch::tensor({int64_t{0}, s.length / 5, s.length / 2, s.length}));
    });
    add_option("block mask", [](const S& s) {
      const int64_t blocks = (s.length + 127) / 128;
      return O().block_mask(torch::rand({blocks, blocks}) > 0.5);
    });
    add_option("bool mask", [](const S& s) { return O().mask(torch::rand({s.length, s.length}) > 0.5); });
    add_option("bias", [](const S& s) { return O().bias(torch::randn({s.length, s.length})); });
    add_option("bias, gradient", [](const S& s) { return O().bias(learned({s.heads, s.length, s.length})); });
    add_option("bias for all heads, gradient", [](const S& s) { return O().bias(learned({s.length, s.length})); });
    add_option("bias of keys, gradient", [](const S& s) { return O().bias(learned({s.batch, 1, 1, s.length})); });
    add_option("relative bias, gradient", [](const S& s) {
      return O().relative_bias(learned({s.heads, 2 * s.length - 1}));
    });
    add_option("slope a head, gradient", [](const S& s) { return O().alibi_slopes(learned({s.heads, 1})); });
    add_option("slope a query, gradient", [](const S& s) {
      return O().alibi_slopes(learned({s.batch, s.heads, s.length}));
    });
    add_option("softcap", [](const S&) { return O().softcap(20); });
    add_option("sink, gradient", [](const S& s) { return O().sink(learned({s.heads})); });
    add_option("dropout", [](const S&) { return O().dropout(0.1); });
    add_option("rotary", rotary);
    add_option("polar", polar);
  }

  void add_shapes() {
    add_shape("grouped heads", [](AttentionStep& x, const S& s) {
      const int64_t kv_heads = s.heads % 2 == 0 ? s.heads / 2 : 1;
      x.k = x.k.narrow(1, 0, kv_heads).contiguous(), x.v = x.v.narrow(1, 0, kv_heads).contiguous();
    });
    add_shape("one head of keys", [](AttentionStep& x, const S&) {
      x.k = x.k.narrow(1, 0, 1).contiguous(), x.v = x.v.narrow(1, 0, 1).contiguous();
    });
    add_shape("batches share keys", [](AttentionStep& x, const S&) {
      x.q = torch::cat({x.q, x.q.flip(2)});
      x.k = x.k.narrow(0, 0, 1).contiguous(), x.v = x.v.narrow(0, 0, 1).contiguous();
    });
    add_shape("half the queries",
              [](AttentionStep& x, const S& s) { x.q = x.q.narrow(2, 0, s.length / 2).contiguous(); });
    add_shape("Dv = 2 D", [](AttentionStep& x, const S&) { x.v = torch::cat({x.v, x.v}, -1); });
    add_shape("three dimensions", [](AttentionStep& x, const S&) {
      for (Tensor* t : {&x.q, &x.k, &x.v}) *t = t->flatten(0, 1);
    });
    add_shape("five dimensions", [](AttentionStep& x, const S& s) {
      // [H,L,B,2,D] in memory, seen as [2,B,H,L,D]: batch dimensions that one stride can't step through
      for (Tensor* t : {&x.q, &x.k, &x.v}) {
        *t = torch::randn({s.heads, s.length, s.batch, 2, s.head_dim}).permute({3, 2, 0, 1, 4});
      }
    });
    add_shape("every second feature", [](AttentionStep& x, const S&) {
      for (Tensor* t : {&x.q, &x.k, &x.v}) *t = t->repeat_interleave(2, -1).slice(-1, 0, std::nullopt, 2);
    });
    add_shape("stride 1 along the length", [](AttentionStep& x, const S&) {
      for (Tensor* t : {&x.q, &x.k, &x.v}) *t = t->transpose(2, 3).contiguous().transpose(2, 3);
    });
    add_shape("log-sum-exp, gradient", [](AttentionStep& x, const S&) { x.with_lse = true; });
  }

  void add_dtypes() {
    const auto nothing = [](const S&) { return O(); };
    add_dtype("double", torch::kDouble, nothing);
    add_dtype("bfloat16", torch::kBFloat16, nothing);
    add_dtype("half", torch::kHalf, nothing);
    add_dtype("bfloat16, rotary", torch::kBFloat16, rotary);
    add_dtype("bfloat16, polar", torch::kBFloat16, polar);
    add_dtype("bfloat16, float bias, gradient", torch::kBFloat16, [](const S& s) {
      return O().bias(learned({s.heads, s.length, s.length}));
    });
    add_dtype("bfloat16, bias, gradient", torch::kBFloat16, [](const S& s) {
      return O().bias(torch::randn({s.heads, s.length, s.length}).to(torch::kBFloat16).requires_grad_());
    });
    add("bfloat16, grouped heads", [](const S& s) {
      AttentionStep x{torch::randn(s.shape()).to(torch::kBFloat16), {}, {}};
      x.k = torch::randn({s.batch, 1, s.length, s.head_dim}).to(torch::kBFloat16), x.v = x.k.clone();
      return x;
    });
  }

  std::vector<AttentionCapability> all_;
};

inline std::vector<AttentionCapability> attention_capabilities() { return AttentionCapabilities().all(); }

}  // namespace headroom::benchmarks
