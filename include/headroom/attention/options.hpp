#pragma once

#include <ATen/core/Generator.h>
#include <torch/arg.h>
#include <torch/types.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/attention/score_function.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"

namespace headroom::inline v0 {

/// Who computes attention.
enum class AttentionBackend {
  automatic,  ///< the best backend for the device and the request; never one that stores L x L scores
  tiled,      ///< headroom's CPU kernel: scores live in tiles of a few KiB
  fused,      ///< the fused kernels of LibTorch's scaled_dot_product_attention, mainly for CUDA
  chunked,    ///< ATen operators over chunks of queries and keys, on any device
  reference,  ///< matmul, softmax, matmul: stores L x L scores; for tests and comparisons
};

inline constexpr std::string_view kAttentionBackendNames[] = {"automatic", "tiled", "fused", "chunked", "reference"};

inline std::ostream& operator<<(std::ostream& out, AttentionBackend backend) {
  return out << kAttentionBackendNames[static_cast<int>(backend)];
}

/// The backend of a name. Throws headroom.attention.backend_name.
inline AttentionBackend attention_backend(std::string_view name) {
  const auto& names = kAttentionBackendNames;
  const auto found = std::ranges::find(names, name);
  if (found == std::end(names)) {
    fail("headroom.attention.backend_name", "there is no backend \"", name, "\"; expected one of ",
         core::word_list(names));
  }
  return static_cast<AttentionBackend>(found - std::begin(names));
}

/// How queries are aligned with keys, before query_offset.
enum class AttentionAlignment {
  top_left,      ///< the first query stands at the first key
  bottom_right,  ///< the last query stands at the last key
};

inline constexpr std::string_view kAttentionAlignmentNames[] = {"top_left", "bottom_right"};

/// The alignment of a name. Throws headroom.attention.alignment_name.
inline AttentionAlignment attention_alignment(std::string_view name) {
  for (const auto alignment : {AttentionAlignment::top_left, AttentionAlignment::bottom_right}) {
    if (name == kAttentionAlignmentNames[static_cast<int>(alignment)]) return alignment;
  }
  fail("headroom.attention.alignment_name", "there is no alignment \"", name, "\"; expected top_left or bottom_right");
}

/// Sliding window around a query's position; negative: unlimited on that side.
struct AttentionWindow {
  int64_t left = -1, right = -1;
};

/// What may be asked of headroom::attention beside q, k and v:
///   softmax(f(softcap(scale·q·kᵀ) + bias + relative_bias - alibi_slopes·|distance|), over the allowed keys)·v
/// where f is score_function, if there is one.
/// Query i stands at position p = i + query_offset among the keys, p = i + Lk - Lq + query_offset with the alignment
/// bottom_right; its distance to key j is p - j. In packed sequences i and j count from the start of their sequence,
/// and Lq and Lk are its lengths.
struct AttentionOptions {
  /// Factor of q·kᵀ; 1/sqrt(D) unless given.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;

  // ---- which keys a query may see: all of these at once ----
  /// top_left: the first query of a sequence stands at its first key; bottom_right: the last one at its last key.
  TORCH_ARG(AttentionAlignment, alignment) = AttentionAlignment::top_left;
  /// Added to the positions of all queries.
  TORCH_ARG(int64_t, query_offset) = 0;
  /// A query sees keys up to its position.
  TORCH_ARG(bool, causal) = false;
  /// A query at position p sees keys p - left … p + right.
  TORCH_ARG(std::optional<AttentionWindow>, window) = std::nullopt;
  /// Widens the window by global tokens: keys at the first positions are seen by all, and a query that stands at one of
  /// them sees all keys.
  TORCH_ARG(int64_t, global_keys) = 0;
  /// How many of the keys are valid: integers on the CPU, broadcastable to the batch dimensions of q.
  TORCH_ARG(std::optional<torch::Tensor>, key_lengths) = std::nullopt;
  /// Packed sequences of different lengths: where each one starts, and the end of the last, [S+1] integers on the CPU,
  /// from 0 to Lq without decreasing. A query sees the keys of its own sequence.
  TORCH_ARG(std::optional<torch::Tensor>, sequence_starts) = std::nullopt;
  /// The same for the keys, where they differ from the queries'; from 0 to Lk.
  TORCH_ARG(std::optional<torch::Tensor>, key_sequence_starts) = std::nullopt;
  /// bool, broadcastable to [..., H, Lq, Lk]: true where a query may see a key.
  TORCH_ARG(std::optional<torch::Tensor>, mask) = std::nullopt;
  /// The same the other way round: true where a query must not see a key.
  TORCH_ARG(std::optional<torch::Tensor>, hidden) = std::nullopt;
  /// bool, broadcastable to [..., H, ceil(Lq / block_size), ceil(Lk / block_size)]: blocks that may be seen.
  TORCH_ARG(std::optional<torch::Tensor>, block_mask) = std::nullopt;
  TORCH_ARG(int64_t, block_size) = 128;
  /// A function of one's own that says which pairs, or which range of keys, are seen. It counts queries and keys from
  /// the start of q and k, and batches as one dimension. Served by the backend tiled.
  TORCH_ARG(std::optional<MaskFunction>, mask_function) = std::nullopt;

  // ---- what is added to a score; all of these are differentiable ----
  /// Floating point, broadcastable to [..., H, Lq, Lk].
  TORCH_ARG(std::optional<torch::Tensor>, bias) = std::nullopt;
  /// [H, 2R-1] or [1, 2R-1]: element R-1+distance; distances beyond ±(R-1) take the outermost elements.
  TORCH_ARG(std::optional<torch::Tensor>, relative_bias) = std::nullopt;
  /// Broadcastable to [..., H, Lq]: slope·|distance| is subtracted. [H, 1] is ALiBi (Press et al. 2021).
  TORCH_ARG(std::optional<torch::Tensor>, alibi_slopes) = std::nullopt;
  /// [H]: a score without a value that takes its share of the weights (attention sink).
  TORCH_ARG(std::optional<torch::Tensor>, sink) = std::nullopt;

  /// Scores s become softcap·tanh(s / softcap) before anything is added.
  TORCH_ARG(std::optional<double>, softcap) = std::nullopt;
  /// A function of one's own, which gets scores with all that is added and returns what goes into the softmax. It
  /// counts as mask_function does. Served by the backend tiled.
  TORCH_ARG(std::optional<ScoreFunction>, score_function) = std::nullopt;
  /// Complex [positions, R/2], as nn::rotary_table makes it: rotates the first R features of q and k, in neighbouring
  /// pairs, by row p for a query and row j for a key.
  TORCH_ARG(std::optional<torch::Tensor>, rotary) = std::nullopt;
  /// Polar position embedding (PoPE; Gopalakrishnan et al. 2025): [positions, 2D], a row of D cosines and D sines of
  /// angles for each position, as nn::polar_table makes it. q·kᵀ becomes the sum over features d of
  /// softplus(q_d)·softplus(k_d)·cos(angle d of row j - angle d of row p + phase). Not with rotary.
  TORCH_ARG(std::optional<torch::Tensor>, polar) = std::nullopt;
  /// The phase of polar, [Hk, D], differentiable; 0 unless given.
  TORCH_ARG(std::optional<torch::Tensor>, polar_phase) = std::nullopt;
  /// Probability that a weight is dropped, in [0, 1); the others grow by 1 / (1 - dropout).
  TORCH_ARG(double, dropout) = 0.0;
  /// Where dropout's seed is drawn from; LibTorch's default CPU generator unless given.
  TORCH_ARG(std::optional<at::Generator>, generator) = std::nullopt;
  /// Dropout's seed itself: the same weights are dropped whenever it is the same. No generator is asked then.
  TORCH_ARG(std::optional<uint64_t>, seed) = std::nullopt;

  TORCH_ARG(AttentionBackend, backend) = AttentionBackend::automatic;
};

namespace detail {

/// The options' tensors that need a gradient.
inline std::vector<torch::Tensor> differentiable(const AttentionOptions& options) {
  std::vector<torch::Tensor> all;
  for (const auto& x :
       {options.bias(), options.relative_bias(), options.alibi_slopes(), options.sink(), options.polar_phase()}) {
    if (x.has_value() && x->defined() && x->requires_grad()) all.push_back(*x);
  }
  if (options.score_function().has_value()) {
    for (const torch::Tensor& x : options.score_function()->tables()) {
      if (x.defined() && x.requires_grad()) all.push_back(x);
    }
  }
  return all;
}

}  // namespace detail

}  // namespace headroom::inline v0
