#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "headroom/plan/kernels/registry.hpp"

namespace headroom::inline v0::detail::meta {

/// Queries and keys that LibTorch's CPU kernel takes at a time.
inline std::pair<int64_t, int64_t> flash_tile(const Tensor& q, const Tensor& k) {
  const int64_t queries = q.size(2), rows = queries >= 768 ? 256 : queries >= 192 ? 64 : 32;
  return {std::min(rows, queries), std::min<int64_t>(512, k.size(2))};
}

inline std::tuple<Tensor, Tensor> flash_attention_for_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double,
                                                          bool, const OptionalTensor&, std::optional<double>) {
  // [batch, heads, length, dim] that lies in memory as [batch, length, heads, dim]
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(type)).transpose(1, 2);
  const auto [rows, columns] = flash_tile(q, k);
  const Tensor scratch = at::empty({at::get_num_threads(), rows * (columns + 2 + v.size(3))}, q.options().dtype(type));
  const bool narrow = q.scalar_type() != type;
  const Tensor weights = at::empty({at::get_num_threads(), rows, narrow ? columns : 0}, q.options());
  return {out, lse};
}
inline std::tuple<Tensor, Tensor, Tensor> flash_attention_for_cpu_backward(const Tensor&, const Tensor& q,
                                                                           const Tensor& k, const Tensor& v,
                                                                           const Tensor&, const Tensor&, double, bool,
                                                                           const OptionalTensor&,
                                                                           std::optional<double>) {
  const auto zeros = [](const Tensor& x) {
    return at::zeros({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  const Tensor dq = zeros(q), dk = zeros(k), dv = zeros(v);
  const auto type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto [rows, columns] = flash_tile(q, k);
  const Tensor scratch = at::empty({at::get_num_threads(), 2 * rows * columns}, q.options().dtype(type));
  const Tensor delta = at::empty({at::get_num_threads(), rows}, q.options().dtype(type));  // one a thread
  const bool narrow = q.scalar_type() != type;
  const Tensor weights = at::empty({at::get_num_threads(), 2, rows, narrow ? columns : 0}, q.options());
  return {dq, dk, dv};
}

/// The kernels of CUDA: what they return and keep for backward. Their lse has rows for whole blocks of 32 queries.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(const Tensor& q, const Tensor&, const Tensor& v,
                                                                      const OptionalTensor&, bool with_lse, double,
                                                                      bool, std::optional<double>) {
  const int64_t rows = with_lse ? (q.size(2) + 31) / 32 * 32 : 0;
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  const auto counter = at::empty({}, q.options().dtype(at::kLong));
  return {out, at::empty({q.size(0), q.size(1), rows}, q.options().dtype(at::kFloat)), counter, counter.clone()};
}
inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, double, std::array<bool, 4> wanted, bool, std::optional<double>) {
  const auto grad = [](const Tensor& x) {
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  const Tensor delta = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  return {grad(q), grad(k), grad(v), wanted[3] && bias.defined() ? like(bias) : Tensor()};
}

inline void register_attention(KernelRegistry& add) {
  add("_scaled_dot_product_flash_attention_for_cpu", &flash_attention_for_cpu);
  add("_scaled_dot_product_flash_attention_for_cpu_backward", &flash_attention_for_cpu_backward);
  add("_scaled_dot_product_efficient_attention", &efficient_attention);
  add("_scaled_dot_product_efficient_attention_backward", &efficient_attention_backward);
}

}  // namespace headroom::inline v0::detail::meta
