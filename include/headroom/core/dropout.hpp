#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace headroom::inline v0::core {

/// Dropout of attention weights without a stored mask: whether weight (head, query, key) is kept is a hash of the seed
/// and the three indices, so that every pass over the weights sees the same mask, in any order.
struct Dropout {
  double probability = 0;
  std::uint64_t seed = 0;

  bool active() const { return probability > 0; }
  /// What a kept weight is multiplied by.
  double gain() const { return 1 / (1 - probability); }
  /// A weight is kept if its bits are not below this.
  std::uint32_t threshold() const {
    return static_cast<std::uint32_t>(std::min(std::round(probability * 4294967296.0), 4294967295.0));
  }

  /// lowbias32 by C. Wellons: every input bit flips half of the output bits.
  static constexpr std::uint32_t mix(std::uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352dU;
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return x ^ (x >> 16);
  }
  /// Key of a row of weights; `head` counts through batches and heads.
  std::uint32_t row_key(std::uint32_t head, std::uint32_t query) const {
    const auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
    return mix(mix(mix(low + head) ^ high) + query);
  }
  /// Uniform bits of one weight.
  static constexpr std::uint32_t bits(std::uint32_t row_key, std::uint32_t key) {
    return mix(row_key + key * 0x9e3779b9U);
  }
};

}  // namespace headroom::inline v0::core
