#pragma once

#include <torch/types.h>

#include "headroom/core/finite.hpp"

// Zero times NaN is NaN: products with hidden keys leave rows that are not finite out.
namespace headroom::inline v0::detail {

/// Rows [..., L] of x [..., L, D] that hold a NaN or an infinity; undefined if none does.
inline torch::Tensor rows_not_finite(const torch::Tensor& x) {
  const torch::Tensor values = x.detach();
  if (values.is_meta() || values.numel() == 0) return {};
  // The sum of finite numbers may overflow, which costs time and nothing else
  const double sum = values.sum(values.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat).item<double>();
  if (core::detail::is_finite(sum)) return {};
  return values.isfinite().all(-1).logical_not();
}
inline torch::Tensor either(const torch::Tensor& a, const torch::Tensor& b) {
  return a.defined() && b.defined() ? a.logical_or(b) : a.defined() ? a : b;
}
/// x with zeros for the rows that `bad` names.
inline torch::Tensor without_rows(const torch::Tensor& x, const torch::Tensor& bad) {
  return bad.defined() ? x.masked_fill(bad.unsqueeze(-1), 0) : x;
}

}  // namespace headroom::inline v0::detail
