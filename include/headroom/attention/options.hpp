#pragma once

#include <torch/arg.h>
#include <torch/types.h>

#include <optional>
#include <ostream>
#include <string_view>

namespace headroom::inline v0 {

/// Who computes attention.
enum class AttentionBackend {
  automatic,  ///< the best backend for the device and the request; never one that stores L x L scores
  tiled,      ///< headroom's CPU kernel: scores live in tiles of a few KiB
  reference,  ///< matmul, softmax, matmul: stores L x L scores; for tests and comparisons
};

inline constexpr std::string_view kAttentionBackendNames[] = {"automatic", "tiled", "reference"};

inline std::ostream& operator<<(std::ostream& out, AttentionBackend backend) {
  return out << kAttentionBackendNames[static_cast<int>(backend)];
}

/// What may be asked of headroom::attention beside q, k and v.
struct AttentionOptions {
  /// Query i sees keys 0 … i (aligned top left).
  TORCH_ARG(bool, causal) = false;
  /// How many of the keys are valid: integers on the CPU, broadcastable to the batch dimensions of q.
  TORCH_ARG(std::optional<torch::Tensor>, key_lengths) = std::nullopt;
  /// Factor of q·kᵀ; 1/sqrt(D) unless given.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  TORCH_ARG(AttentionBackend, backend) = AttentionBackend::automatic;
};

}  // namespace headroom::inline v0
