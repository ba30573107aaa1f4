#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "headroom/core/attention.hpp"
#include "support/catch.hpp"

namespace headroom::testing {

using namespace core;

/// A mask of any type.
struct AnyMask {
  std::function<KeyRange(Index b, Index h, Index query)> range, other_range;
  KeyRange keys(Index b, Index h, Index query) const { return range(b, h, query); }
  KeyRange other_keys(Index b, Index h, Index query) const { return other_range(b, h, query); }
};

/// Both passes by the definition. The yardstick is compiled as written, in reference.cpp: without -Ofast and
/// sanitizers.
template <class Scalar>
void run_reference(const AttentionTensors<Scalar>& forward, const AttentionBackwardTensors<Scalar>& backward,
                   const AttentionParams& params, const AnyMask& mask);

/// Extents of something broadcast to [B,H,Lq,Lk]: 1 where it is broadcast, all 0 when it is not there.
using Extents = std::array<Index, 4>;

struct Problem {
  Index batch = 1, heads = 2, queries = 64, keys = 64, dim = 16, value_dim = 16;
  double amplitude = 1;  // of q: larger scores, sharper weights
  Index kv_heads = 0;    // as many as heads unless given
  bool one_kv_batch = false;
  Extents bias{}, mask{}, slopes{};
  Index relative_reach = 0;  // R of the relative bias
  bool relative_shared = false;
  bool sink = false, rotary = false, grad_lse = false;
  bool polar = false, polar_phase = false;  // either with rotary or not
  Index blocks = 0;                         // block size of a block mask
  unsigned seed = 7;

  Index table_rows() const { return std::max(queries, keys) + 200; }  // of rotary and polar tables
};

/// Everything that can be asked for beside q, k and v.
inline const Problem kEverything{.batch = 2,
                                 .heads = 4,
                                 .queries = 131,
                                 .keys = 170,
                                 .dim = 24,
                                 .value_dim = 40,
                                 .kv_heads = 2,
                                 .bias = {1, 4, 131, 170},
                                 .mask = {2, 1, 131, 170},
                                 .slopes = {2, 4, 131, 1},
                                 .relative_reach = 60,
                                 .sink = true,
                                 .rotary = true,
                                 .grad_lse = true,
                                 .blocks = 30};
inline const AttentionParams kEveryOption{.softcap = 8, .query_offset = 39, .dropout = {0.1, 99}};

/// All tensors of a forward and backward pass, dense.
template <class Scalar>
struct Run {
  Problem p;
  std::vector<Scalar> q, k, v, grad, output, grad_q, grad_k, grad_v;
  std::vector<double> lse;
  std::vector<Scalar> bias, relative, slopes, sink, rotary, polar, polar_phase, grad_bias;
  std::vector<double> grad_relative, grad_slopes, grad_sink, grad_lse, grad_phase;
  std::vector<double> grad_tables;  // of a score function, as long as its tables
  std::unique_ptr<bool[]> mask, blocks;

  explicit Run(const Problem& problem) : p(problem) {
    if (p.kv_heads == 0) p.kv_heads = p.heads;
    std::mt19937 generator(p.seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<Scalar>& x, Index count, double amplitude = 1) {
      x.resize(count);
      for (Scalar& e : x) e = static_cast<Scalar>(amplitude * normal(generator));
    };
    const Index kv = (p.one_kv_batch ? 1 : p.batch) * p.kv_heads;
    fill(q, p.batch * p.heads * p.queries * p.dim, p.amplitude), fill(k, kv * p.keys * p.dim);
    fill(v, kv * p.keys * p.value_dim), fill(grad, p.batch * p.heads * p.queries * p.value_dim);
    const auto count = [](const Extents& e) { return e[0] * e[1] * e[2] * e[3]; };
    fill(bias, count(p.bias)), fill(slopes, count(p.slopes), 0.05), fill(sink, p.sink ? p.heads : 0);
    fill(relative, p.relative_reach == 0 ? 0 : (p.relative_shared ? 1 : p.heads) * (2 * p.relative_reach - 1));
    const auto flags = [&](Index n) {
      auto x = std::make_unique<bool[]>(n);
      for (Index i = 0; i < n; ++i) x[i] = normal(generator) > 0;
      return x;
    };
    if (count(p.mask) > 0) mask = flags(count(p.mask));
    if (p.blocks > 0) blocks = flags(p.heads * block_count(p.queries) * block_count(p.keys));
    if (p.rotary) {
      const Index positions = p.table_rows(), pairs = p.dim / 2;
      for (Index l = 0; l < positions; ++l) {
        for (Index i = 0; i < pairs; ++i) {
          // a float table for all: cosines that differ would be a difference of the problem
          const float angle =
              static_cast<float>(l) * std::pow(100.0F, -static_cast<float>(i) / static_cast<float>(pairs));
          rotary.push_back(std::cos(angle)), rotary.push_back(std::sin(angle));
        }
      }
    }
    const auto add_turns = [&](std::vector<Scalar>& to, auto&& angle) {  // cosines and sines of [D] angles
      for (Index d = 0; d < p.dim; ++d) to.push_back(std::cos(angle(d)));
      for (Index d = 0; d < p.dim; ++d) to.push_back(std::sin(angle(d)));
    };
    for (Index l = 0; l < p.table_rows() && p.polar; ++l) {
      add_turns(polar, [&](Index d) {
        return static_cast<float>(l) * std::pow(100.0F, -static_cast<float>(d) / static_cast<float>(p.dim));
      });
    }
    for (Index h = 0; h < p.kv_heads && p.polar_phase; ++h) {
      add_turns(polar_phase, [&](Index d) { return static_cast<float>(h) - 0.3F * static_cast<float>(d); });
    }
    grad_phase.assign(polar_phase.size() / 2, 0);
    // what must be overwritten
    output.assign(grad.size(), 1e6), grad_q.assign(q.size(), 1e6), grad_k.assign(k.size(), 1e6),
        grad_v.assign(v.size(), 1e6);
    lse.assign(p.batch * p.heads * p.queries, 1e6);
    // what must be added to
    grad_bias.assign(bias.size(), 0), grad_relative.assign(relative.size(), 0), grad_slopes.assign(slopes.size(), 0),
        grad_sink.assign(sink.size(), 0);
    if (p.grad_lse) {
      for (size_t i = 0; i < lse.size(); ++i) grad_lse.push_back(static_cast<double>(normal(generator)));
    }
  }
  Index block_count(Index length) const { return (length + p.blocks - 1) / p.blocks; }

  template <class T>
  TensorView<T> of(std::vector<T>& x, Index length, Index dim) {
    return dense_view(x.data(), p.batch, p.heads, length, dim);
  }
  template <class T>
  TensorView<T> of_kv(std::vector<T>& x, Index dim) {
    return dense_view(x.data(), p.one_kv_batch ? 1 : p.batch, p.kv_heads, p.keys, dim);
  }
  /// [B,H,Lq,Lk] over dense data of fewer extents.
  template <class T>
  TensorView<T> broadcast(T* data, const Extents& e, Extents full) {
    if (e[0] == 0) return {};
    TensorView<T> view{data, full, {e[1] * e[2] * e[3], e[2] * e[3], e[3], 1}};
    for (int d = 0; d < 4; ++d) view.strides[d] = e[d] == 1 ? 0 : view.strides[d];
    return view;
  }
  template <class T>
  TensorView<T> per_distance(std::vector<T>& x) {
    const Index count = 2 * p.relative_reach - 1;
    return {x.data(), {1, p.heads, 1, count}, {0, p.relative_shared ? 0 : count, 0, 1}};
  }
  AttentionParams with_tensors(AttentionParams params) {
    if (p.bias[0] > 0) params.bias = broadcast(bias.data(), p.bias, {p.batch, p.heads, p.queries, p.keys});
    if (p.slopes[0] > 0) params.slopes = broadcast(slopes.data(), p.slopes, {p.batch, p.heads, p.queries, 1});
    if (p.relative_reach > 0) params.relative_bias = per_distance(relative);
    if (p.sink) params.sink = dense_view(sink.data(), 1, p.heads, 1, 1);
    if (p.rotary) params.rotary = dense_view(rotary.data(), 1, 1, p.table_rows(), p.dim / 2 * 2);
    if (p.polar) params.polar = dense_view(polar.data(), 1, 1, p.table_rows(), 2 * p.dim);
    if (p.polar_phase) params.polar_phase = dense_view(polar_phase.data(), 1, p.kv_heads, 1, 2 * p.dim);
    if (mask != nullptr) {
      params.mask = broadcast<const bool>(mask.get(), p.mask, {p.batch, p.heads, p.queries, p.keys});
    }
    if (blocks != nullptr) {
      params.block_size = p.blocks;
      params.block_mask = broadcast<const bool>(blocks.get(), {1, p.heads, block_count(p.queries), block_count(p.keys)},
                                                {p.batch, p.heads, block_count(p.queries), block_count(p.keys)});
    }
    return params;
  }
  AttentionParamGradients param_grads() {
    AttentionParamGradients grads;
    if (p.bias[0] > 0) grads.bias = broadcast(grad_bias.data(), p.bias, {p.batch, p.heads, p.queries, p.keys});
    if (p.slopes[0] > 0) grads.slopes = broadcast(grad_slopes.data(), p.slopes, {p.batch, p.heads, p.queries, 1});
    if (p.relative_reach > 0) grads.relative_bias = per_distance(grad_relative);
    if (p.sink) grads.sink = dense_view(grad_sink.data(), 1, p.heads, 1, 1);
    if (p.polar_phase) grads.polar_phase = dense_view(grad_phase.data(), 1, p.kv_heads, 1, p.dim);
    if (!grad_tables.empty()) {
      grads.score_tables = dense_view(grad_tables.data(), 1, 1, 1, static_cast<Index>(grad_tables.size()));
    }
    return grads;
  }
  TensorView<const double> grad_lse_view() {
    return p.grad_lse ? TensorView<const double>(of(grad_lse, p.queries, 1)) : TensorView<const double>();
  }

  /// The tensors of both passes; others of the same shapes may take the place of some.
  AttentionTensors<Scalar> forward_tensors() {
    return {.q = of(q, p.queries, p.dim),
            .k = of_kv(k, p.dim),
            .v = of_kv(v, p.value_dim),
            .output = of(output, p.queries, p.value_dim),
            .lse = of(lse, p.queries, 1)};
  }
  AttentionBackwardTensors<Scalar> backward_tensors() {
    return {.q = of(q, p.queries, p.dim),
            .k = of_kv(k, p.dim),
            .v = of_kv(v, p.value_dim),
            .output = of(output, p.queries, p.value_dim),
            .lse = of(lse, p.queries, 1),
            .grad_output = of(grad, p.queries, p.value_dim),
            .grad_lse = grad_lse_view(),
            .grad_q = of(grad_q, p.queries, p.dim),
            .grad_k = of_kv(grad_k, p.dim),
            .grad_v = of_kv(grad_v, p.value_dim),
            .param_grads = param_grads()};
  }

  template <class M = NoMask, class E = SerialExecutor>
  Run& tiled(const AttentionParams& options = {}, const M& mask = {}, const E& executor = {}) {
    const AttentionParams params = with_tensors(options);
    attention_forward(forward_tensors(), params, mask, executor);
    attention_backward(backward_tensors(), params, mask, executor);
    return *this;
  }
  template <class M = NoMask>
  Run& reference(const AttentionParams& options = {}, const M& mask = {}) {
    run_reference(forward_tensors(), backward_tensors(), with_tensors(options),
                  {[&](Index b, Index h, Index query) { return mask.keys(b, h, query); },
                   [&](Index b, Index h, Index query) {
                     if constexpr (TwoRangeMask<M>) return mask.other_keys(b, h, query);
                     return KeyRange{};
                   }});
    return *this;
  }
};

struct Deviation {
  double squares = 0, maximum = 0;
  Index count = 0;

  double rms() const { return count == 0 ? 0 : std::sqrt(squares / static_cast<double>(count)); }
  template <class A, class B>
  void add(const std::vector<A>& x, const std::vector<B>& exact) {
    for (size_t i = 0; i < x.size(); ++i) {
      const auto ours = static_cast<double>(x[i]), theirs = static_cast<double>(exact[i]);
      const double e = ours == theirs ? 0 : std::abs(ours - theirs);  // infinities too
      if (!(e <= maximum) && maximum == maximum) maximum = e;         // a NaN stays
      squares += e * e;
    }
    count += static_cast<Index>(x.size());
  }
};

template <class A, class B>
Deviation deviation(const std::vector<A>& x, const std::vector<B>& exact) {
  Deviation d;
  d.add(x, exact);
  return d;
}

/// f(name, result of a run, of another, …) for everything that a pass computes.
template <class F, class... Runs>
void for_each_result(F&& f, Runs&... run) {
  f("output", run.output...), f("grad_q", run.grad_q...), f("grad_k", run.grad_k...), f("grad_v", run.grad_v...);
  f("grad_bias", run.grad_bias...), f("grad_relative", run.grad_relative...), f("grad_slopes", run.grad_slopes...);
  f("grad_sink", run.grad_sink...), f("grad_phase", run.grad_phase...), f("lse", run.lse...);
}

/// Two runs computed the same bits.
template <class R>
void check_same(R& run, R& other) {
  for_each_result(
      [](const char* name, const auto& x, const auto& y) {
        CAPTURE(name);
        CHECK((x == y));
      },
      run, other);
}

/// float kernel against double definition: at most twice the RMS and four times the maximum error of plain float loops.
/// With fewer than 16 keys both errors are a handful of roundings of terms that cancel: four roundings of the largest
/// term are allowed there. A result of a few numbers makes no statistic: the problem is repeated with other data until
/// there are 64. A maximum hangs on one number: what fails is judged again together with three more draws, and with as
/// many as make 256 numbers.
template <class M = NoMask>
void check_accuracy(Problem p, const AttentionParams& params = {}, const M& mask = {}) {
  CAPTURE(p.batch, p.heads, p.queries, p.keys, p.dim, p.value_dim, p.amplitude);
  std::map<std::string, Deviation> ours, theirs;
  double largest_term = 1;
  const auto run = [&](auto&& is_wanted) {
    Run<float> tiled(p), naive(p);
    Run<double> exact(p), tiled_double(p);
    tiled.tiled(params, mask), naive.reference(params, mask), exact.reference(params, mask);
    tiled_double.tiled(params, mask);
    for_each_result(
        [&](const std::string& name, const auto& x, const auto& by_naive, const auto& by_exact, const auto& by_double) {
          CAPTURE(name);
          if (x.empty() || !is_wanted(name)) return;
          ours[name].add(x, by_exact), theirs[name].add(by_naive, by_exact);
          const bool of_tokens = name == "output" || name == "grad_q" || name == "grad_k" || name == "grad_v";
          const double terms = static_cast<double>(p.dim * p.keys * (of_tokens ? 1 : p.batch * p.heads * p.queries));
          CHECK(deviation(by_double, by_exact).maximum < 1e-13 * p.amplitude * std::sqrt(terms));
        },
        tiled, naive, exact, tiled_double);
    double term = 1;
    for (const auto* x : {&tiled.q, &tiled.k, &tiled.v, &tiled.grad}) {
      double largest = 1;
      for (const float e : *x) largest = std::max<double>(largest, std::abs(e));
      term *= largest;
    }
    largest_term = std::max(largest_term, term);
  };
  const auto everything = [](const std::string&) { return true; };
  run(everything);
  const auto is_small = [&](const std::string& name) { return ours[name].count < 64; };
  const auto any = [&](auto&& holds) {
    return std::any_of(ours.begin(), ours.end(), [&](const auto& result) { return holds(result.first); });
  };
  for (; p.keys >= 16 && any(is_small); run(is_small)) ++p.seed;
  // Beside terms this large a rounding of a rounding is nothing: what a softmax leaves of a weight next to 0 is one
  // number's luck
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
  const auto rounding = [&] { return (p.keys < 16 ? 4 : kEpsilon) * kEpsilon * largest_term; };
  const auto allowed_rms = [&](const std::string& name) { return std::max(2 * theirs[name].rms(), rounding()); };
  const auto allowed_maximum = [&](const std::string& name) { return std::max(4 * theirs[name].maximum, rounding()); };
  const auto fails = [&](const std::string& name) {
    return !(ours[name].rms() <= allowed_rms(name) && ours[name].maximum <= allowed_maximum(name));
  };
  for (int draw = 0; draw < 3 && any(fails); ++draw) {
    ++p.seed;
    run(everything);
  }
  const auto is_unsure = [&](const std::string& name) { return fails(name) && ours[name].count < 256; };
  for (; any(is_unsure); run(is_unsure)) ++p.seed;
  for (const auto& [name, error] : ours) {
    CAPTURE(name, error.count);
    CHECK(error.rms() <= allowed_rms(name));
    CHECK(error.maximum <= allowed_maximum(name));
  }
}

}  // namespace headroom::testing
