#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "headroom/core/attention.hpp"
#include "support/catch.hpp"

// The yardstick is the definition as written, also where the kernel is compiled with -Ofast
#pragma GCC push_options
#pragma GCC optimize("no-fast-math")
#include "headroom/core/attention_reference.hpp"
#pragma GCC pop_options

namespace headroom::testing {

using namespace core;

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
  Index blocks = 0;  // block size of a block mask
};

/// All tensors of a forward and backward pass, dense.
template <class Scalar>
struct Run {
  Problem p;
  std::vector<Scalar> q, k, v, grad, output, grad_q, grad_k, grad_v;
  std::vector<double> lse;
  std::vector<Scalar> bias, relative, slopes, sink, rotary, grad_bias;
  std::vector<double> grad_relative, grad_slopes, grad_sink, grad_lse;
  std::unique_ptr<bool[]> mask, blocks;

  explicit Run(const Problem& problem) : p(problem) {
    if (p.kv_heads == 0) p.kv_heads = p.heads;
    std::mt19937 generator(7);
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
      const Index positions = std::max(p.queries, p.keys) + 200, pairs = p.dim / 2;
      for (Index l = 0; l < positions; ++l) {
        for (Index i = 0; i < pairs; ++i) {
          // a float table for all: cosines that differ would be a difference of the problem
          const float angle =
              static_cast<float>(l) * std::pow(100.0F, -static_cast<float>(i) / static_cast<float>(pairs));
          rotary.push_back(std::cos(angle)), rotary.push_back(std::sin(angle));
        }
      }
    }
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
    if (p.rotary) params.rotary = dense_view(rotary.data(), 1, 1, std::max(p.queries, p.keys) + 200, p.dim / 2 * 2);
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
  AttentionParamGradients<Scalar> param_grads() {
    AttentionParamGradients<Scalar> grads;
    if (p.bias[0] > 0) grads.bias = broadcast(grad_bias.data(), p.bias, {p.batch, p.heads, p.queries, p.keys});
    if (p.slopes[0] > 0) grads.slopes = broadcast(grad_slopes.data(), p.slopes, {p.batch, p.heads, p.queries, 1});
    if (p.relative_reach > 0) grads.relative_bias = per_distance(grad_relative);
    if (p.sink) grads.sink = dense_view(grad_sink.data(), 1, p.heads, 1, 1);
    return grads;
  }
  TensorView<const double> grad_lse_view() {
    return p.grad_lse ? TensorView<const double>(of(grad_lse, p.queries, 1)) : TensorView<const double>();
  }

  template <class M = NoMask, class E = SerialExecutor>
  Run& tiled(const AttentionParams& options = {}, const M& mask = {}, const E& executor = {}) {
    const AttentionParams params = with_tensors(options);
    attention_forward<Scalar>(of(q, p.queries, p.dim), of_kv(k, p.dim), of_kv(v, p.value_dim),
                              of(output, p.queries, p.value_dim), of(lse, p.queries, 1), params, mask, executor);
    attention_backward<Scalar>(of(grad, p.queries, p.value_dim), of(q, p.queries, p.dim), of_kv(k, p.dim),
                               of_kv(v, p.value_dim), of(output, p.queries, p.value_dim), of(lse, p.queries, 1),
                               of(grad_q, p.queries, p.dim), of_kv(grad_k, p.dim), of_kv(grad_v, p.value_dim), params,
                               mask, executor, param_grads(), grad_lse_view());
    return *this;
  }
  template <class M = NoMask>
  Run& reference(const AttentionParams& options = {}, const M& mask = {}) {
    const AttentionParams params = with_tensors(options);
    attention_forward_reference<Scalar>(of(q, p.queries, p.dim), of_kv(k, p.dim), of_kv(v, p.value_dim),
                                        of(output, p.queries, p.value_dim), of(lse, p.queries, 1), params, mask);
    attention_backward_reference<Scalar>(of(grad, p.queries, p.value_dim), of(q, p.queries, p.dim), of_kv(k, p.dim),
                                         of_kv(v, p.value_dim), of(grad_q, p.queries, p.dim), of_kv(grad_k, p.dim),
                                         of_kv(grad_v, p.value_dim), params, mask, param_grads(), grad_lse_view());
    return *this;
  }
};

struct Deviation {
  double rms = 0, maximum = 0;
};
template <class A, class B>
Deviation deviation(const std::vector<A>& x, const std::vector<B>& exact) {
  Deviation d;
  for (size_t i = 0; i < x.size(); ++i) {
    const auto ours = static_cast<double>(x[i]), theirs = static_cast<double>(exact[i]);
    if (ours == theirs) continue;  // infinities too
    const double e = std::abs(ours - theirs);
    if (!(e <= d.maximum) && d.maximum == d.maximum) d.maximum = e;  // a NaN stays
    d.rms += e * e / static_cast<double>(x.size());
  }
  d.rms = std::sqrt(d.rms);
  return d;
}

/// float kernel against double definition: at most twice the RMS and four times the maximum error of plain float loops.
/// With fewer than 16 keys both errors are a handful of roundings of terms that cancel: four roundings of the largest
/// term are allowed there.
template <class M = NoMask>
void check_accuracy(const Problem& p, const AttentionParams& params = {}, const M& mask = {}) {
  CAPTURE(p.batch, p.heads, p.queries, p.keys, p.dim, p.value_dim, p.amplitude);
  Run<float> tiled(p), naive(p);
  Run<double> exact(p);
  tiled.tiled(params, mask), naive.reference(params, mask), exact.reference(params, mask);
  const auto largest = [](const std::vector<float>& x) {
    double m = 1;
    for (const float e : x) m = std::max<double>(m, std::abs(e));
    return m;
  };
  const double largest_term = largest(tiled.q) * largest(tiled.k) * largest(tiled.v) * largest(tiled.grad);
  const auto compare = [&](const char* name, const auto& x, const auto& by_naive, const auto& by_exact) {
    CAPTURE(name);
    const Deviation ours = deviation(x, by_exact), theirs = deviation(by_naive, by_exact);
    const double rounding = p.keys < 16 ? 4 * std::numeric_limits<float>::epsilon() * largest_term : 0;
    CHECK(ours.rms <= std::max(2 * theirs.rms, rounding));
    CHECK(ours.maximum <= std::max(4 * theirs.maximum, rounding));
  };
  const auto results = [](auto& run, auto&& f) {
    f("output", run.output), f("grad_q", run.grad_q), f("grad_k", run.grad_k), f("grad_v", run.grad_v);
    f("grad_bias", run.grad_bias), f("grad_relative", run.grad_relative), f("grad_slopes", run.grad_slopes);
    f("grad_sink", run.grad_sink), f("lse", run.lse);
  };
  std::vector<std::vector<double>> of_naive, of_exact;
  const auto collect = [](std::vector<std::vector<double>>& to) {
    return [&to](const char*, const auto& x) { to.emplace_back(x.begin(), x.end()); };
  };
  results(naive, collect(of_naive)), results(exact, collect(of_exact));
  size_t at = 0;
  results(tiled, [&](const char* name, const auto& x) {
    compare(name, x, of_naive[at], of_exact[at]);
    ++at;
  });
  Run<double> tiled_double(p);
  tiled_double.tiled(params, mask);
  at = 0;
  results(tiled_double, [&](const char* name, const auto& x) {
    CAPTURE(name);
    const double terms = static_cast<double>(p.dim * p.keys * (at > 3 ? p.batch * p.heads * p.queries : 1));
    CHECK(deviation(x, of_exact[at++]).maximum < 1e-13 * p.amplitude * std::sqrt(terms));
  });
}

}  // namespace headroom::testing
