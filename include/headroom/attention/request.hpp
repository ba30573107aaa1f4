#pragma once

#include <torch/types.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "headroom/attention/options.hpp"
#include "headroom/core/dropout.hpp"
#include "headroom/core/mask.hpp"

namespace headroom::inline v0::detail {

/// The sizes before the last `count`.
inline at::IntArrayRef all_but_last(at::IntArrayRef sizes, size_t count) {
  return sizes.slice(0, sizes.size() - count);
}

/// A checked request: q [..., H, Lq, D], k [..., Hk, Lk, D], v [..., Hk, Lk, Dv] of one dtype on one device, where Hk
/// divides H and the batch dimensions of k and v broadcast to those of q. Undefined tensors: not asked for.
struct AttentionRequest {
  /// Of tensors(), of which those come first that are differentiable.
  static constexpr size_t kTensors = 10, kDifferentiable = 6;
  /// Positions are added and subtracted: far from the limits of int64.
  static constexpr int64_t kFar = int64_t{1} << 60;

  std::vector<int64_t> score_sizes;  // [..., H, Lq, Lk]
  int64_t kv_heads = 1;
  double scale = 1;
  double softcap = 0;  // 0: none

  int64_t query_offset = 0;    // of a sequence aligned top left; a whole request's alignment is in it
  bool sequences_end = false;  // packed sequences are aligned bottom right
  bool causal = false;
  int64_t window_left = -1, window_right = -1;         // -1: unlimited
  int64_t global_keys = 0;                             // 0 without a window: then all keys are
  torch::Tensor key_lengths;                           // int64, contiguous, CPU, batch dimensions of q
  torch::Tensor sequence_starts, key_sequence_starts;  // int64 [S+1], contiguous, CPU; both or none
  torch::Tensor mask;                                  // bool, a view expanded to score_sizes
  bool mask_visible = true;                            // the value of `mask` where a query may see a key
  torch::Tensor block_mask;                            // bool, a view expanded to [..., H, nq, nk]; true: visible
  int64_t block_size = 128;

  torch::Tensor bias, relative_bias, alibi_slopes, sink;  // as given: their gradients have these shapes
  torch::Tensor rotary;                                   // complex [P, R/2]
  torch::Tensor polar;                                    // [P, 2D]
  torch::Tensor polar_phase;                              // [Hk, D]
  core::Dropout dropout;

  std::optional<ScoreFunction> score_function;             // without its tables
  std::vector<std::array<int64_t, 2>> score_table_shapes;  // [rows, columns]
  torch::Tensor score_tables;                              // [elements], one after the other, in what is computed in
  std::optional<MaskFunction> mask_function;

  int64_t heads() const { return score_sizes.end()[-3]; }
  int64_t queries() const { return score_sizes.end()[-2]; }
  int64_t keys() const { return score_sizes.end()[-1]; }
  /// Query heads that share a head of k and v.
  int64_t heads_per_kv_head() const { return kv_heads == 0 ? 1 : heads() / kv_heads; }
  at::IntArrayRef batch() const { return all_but_last(score_sizes, 3); }

  torch::Tensor expanded_bias() const { return bias.expand(score_sizes); }                      // as scores
  torch::Tensor expanded_relative_bias() const { return relative_bias.expand({heads(), -1}); }  // [H,2R-1]
  torch::Tensor expanded_slopes() const {                                                       // [...,H,Lq]
    return alibi_slopes.expand(all_but_last(score_sizes, 1));
  }

  /// Position among a sequence's keys of its first query.
  int64_t first_position(int64_t queries, int64_t keys) const {
    return query_offset + (sequences_end ? keys - queries : 0);
  }

  /// Which keys of its sequence a query sees by its position, both counted from the sequence's start: the two ranges of
  /// a mask. The second one is always empty without global keys.
  core::BothMasks<core::GlobalWindowMask, core::CausalMask> position_mask(int64_t first_position) const {
    return {{{window_left, window_right, first_position}, global_keys}, {causal ? first_position : kFar}};
  }

  /// The tensors that were given and not copied, and the tables.
  std::array<torch::Tensor*, kTensors> tensors() {
    return {&bias,        &relative_bias, &alibi_slopes, &sink,   &score_tables,
            &polar_phase, &mask,          &block_mask,   &rotary, &polar};
  }

  /// Fails unless the request is whole; draws dropout's seed.
  static AttentionRequest check(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                                const AttentionOptions& options);
};

}  // namespace headroom::inline v0::detail
