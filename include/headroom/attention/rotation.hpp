#pragma once

#include <torch/types.h>

namespace headroom::inline v0::detail {

/// Neighbouring pairs of features of x [..., D] as complex numbers [..., D/2], in double for double, else in float.
/// A view where LibTorch can see pairs in x's memory: it wants each of them at an even place.
inline torch::Tensor complex_pairs(const torch::Tensor& given) {
  torch::Tensor x = given.to(given.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat).resolve_neg();
  bool even = x.stride(-1) == 1 && x.storage_offset() % 2 == 0;
  for (const int64_t stride : x.strides().slice(0, x.dim() - 1)) even &= stride % 2 == 0;
  if (!even) x = x.clone(at::MemoryFormat::Contiguous);
  return torch::view_as_complex(x.unflatten(-1, {-1, 2}));
}

/// Neighbouring pairs of features of x [..., D] times `turns`, complex and broadcastable to [..., D/2]; in x's dtype.
inline torch::Tensor turned(const torch::Tensor& x, const torch::Tensor& turns) {
  return torch::view_as_real(complex_pairs(x) * turns).flatten(-2).to(x.scalar_type());
}

/// Turns the first features of x [..., L, D] by rows of a complex table [P, R/2]; backwards by its conjugate.
inline torch::Tensor rotated(const torch::Tensor& x, const torch::Tensor& table, const torch::Tensor& rows) {
  const auto complex = x.scalar_type() == torch::kDouble ? torch::kComplexDouble : torch::kComplexFloat;
  const int64_t features = 2 * table.size(1);
  const torch::Tensor first = turned(x.narrow(-1, 0, features), table.index_select(0, rows).to(complex));
  return features == x.size(-1) ? first : torch::cat({first, x.narrow(-1, features, x.size(-1) - features)}, -1);
}

}  // namespace headroom::inline v0::detail
