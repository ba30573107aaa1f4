#pragma once

#include <torch/types.h>

#include <cstdint>

namespace headroom::testing {

/// Numbers in [-1, 1), each a hash of its place and the salt: as tests/models/hashed.py makes them.
inline torch::Tensor hashed_noise(at::IntArrayRef sizes, uint32_t salt) {
  const torch::Tensor x = torch::empty(sizes, torch::kDouble);
  double* const to = x.mutable_data_ptr<double>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    uint32_t h = static_cast<uint32_t>(i) + salt * 0x9E3779B9u;
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15) * 0x846CA68Bu;
    to[i] = (h ^ h >> 16) / 0x1p31 - 1;
  }
  return x;
}

}  // namespace headroom::testing
