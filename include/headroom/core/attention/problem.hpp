#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "headroom/core/attention/mask_function.hpp"
#include "headroom/core/attention/score_function.hpp"
#include "headroom/core/dropout.hpp"
#include "headroom/core/stored.hpp"

namespace headroom::inline v0::core {

/// What attention does with a score before the softmax, beside the ranges of a Mask:
///   f(softcap(scale·q·kᵀ) + bias + relative_bias - slope·|distance|), f a score function of one's own.
/// Query i stands at position p(i) among the keys; its distance to key j is p(i) - j. Views may have stride 0 wherever
/// they are broadcast; one without data is not there.
///
/// With `polar`, polar position embedding (PoPE; Gopalakrishnan et al. 2025), q·kᵀ is the sum over features d of
/// softplus(q_d)·softplus(k_d)·cos(angle of the key's row - angle of the query's row + phase of the key's head).
struct AttentionParams {
  std::optional<double> scale = {};        // 1/sqrt(D) unless given
  double softcap = 0;                      // s becomes softcap·tanh(s / softcap); 0: s stays
  Index query_offset = 0;                  // p(i) = i + query_offset
  const Index* query_positions = nullptr;  // [Lq], instead of the offset
  StoredTensor bias = {};                  // [B,H,Lq,Lk]
  StoredTensor relative_bias = {};         // [1,H,1,2R-1]: element R-1+distance; distances beyond take the outermost
  StoredTensor slopes = {};                // [B,H,Lq,1]
  StoredTensor sink = {};                  // [1,H,1,1]: a score without a value
  TensorView<const bool> mask = {};        // [B,H,Lq,Lk]
  bool mask_visible = true;                // the value in `mask` that lets a query see a key
  TensorView<const bool> block_mask = {};  // [B,H,ceil(Lq/block_size),ceil(Lk/block_size)], true: visible
  Index block_size = 128;
  StoredTensor rotary = {};       // [1,1,rows,2·pairs] of what is computed in: cosine, sine, …; turns q and k
  StoredTensor polar = {};        // [1,1,rows,2D] likewise: D cosines, D sines; puts q and k into polar form, see below
  StoredTensor polar_phase = {};  // [1,Hk,1,2D] likewise: of angles that those of keys have more
  const Index* query_table_rows = nullptr;  // [Lq]: row of either table for a query, p(i) unless given
  const Index* key_table_rows = nullptr;    // [Lk]: row of either table for a key, j unless given
  ScoreFunctionRef score_function = {};
  MaskFunctionRef mask_function = {};
  Dropout dropout = {};
  Index first_head = 0;  // where b·H + h starts counting, for dropout; functions count whole batches

  double scale_for(Index dim) const {
    return scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<Index>(dim, 1))));
  }
  Index position(Index query) const { return query_positions ? query_positions[query] : query + query_offset; }
  bool has_functions() const { return score_function || mask_function; }
  /// Floats in the widest vector that a function of one's own was compiled for; 0 without functions.
  int function_lanes() const { return std::max(score_function.lanes(), mask_function.lanes()); }
  Index table_row_of_query(Index i) const { return query_table_rows ? query_table_rows[i] : position(i); }
  Index table_row_of_key(Index j) const { return key_table_rows ? key_table_rows[j] : j; }
  /// Numbers in a row of q or k as it is multiplied.
  Index features(Index dim) const { return polar ? 2 * dim : dim; }
};

/// Gradients of what AttentionParams adds to scores; one without data is not wanted. They are added to what is there.
/// `bias` has the shape [B,H,Lq,Lk] and stride 0 in dimensions where the bias is broadcast, whose sum it receives.
struct AttentionParamGradients {
  StoredTensor bias = {};
  TensorView<double> relative_bias = {};  // [1,H,1,2R-1], stride 0 between heads that share it
  TensorView<double> slopes = {};         // [B,H,Lq,1], stride 0 where broadcast
  TensorView<double> sink = {};           // [1,H,1,1]
  TensorView<double> polar_phase = {};    // [1,Hk,1,D], of the angles themselves; stride 0 between heads that share it
  TensorView<double> score_tables = {};   // [1,1,1,elements of all tables of the score function, one after the other]

  /// Tiles of scores add to the gradient of a bias, unless it is broadcast along the keys: then their sums over keys
  /// do.
  bool bias_by_tiles() const { return bias && bias.strides[3] != 0; }
  bool bias_over_keys() const { return bias && bias.strides[3] == 0; }
};

/// The tensors of a forward pass, any strides. Hk divides H: each head of k and v serves a run of heads of q.
template <Storable T>
struct AttentionTensors {
  TensorView<const T> q;        // [B,H,Lq,D]
  TensorView<const T> k;        // [B or 1,Hk,Lk,D]
  TensorView<const T> v;        // [B or 1,Hk,Lk,Dv]
  TensorView<T> output;         // [B,H,Lq,Dv]
  TensorView<double> lse = {};  // [B,H,Lq,1], not written where it is null
};

/// The tensors of a backward pass, any strides: what the forward pass read and wrote, the gradients that come, the
/// gradients that go.
template <Storable T>
struct AttentionBackwardTensors {
  TensorView<const T> q, k, v, output;     // as in AttentionTensors
  TensorView<const double> lse;            // [B,H,Lq,1]
  TensorView<const T> grad_output;         // [B,H,Lq,Dv]
  TensorView<const double> grad_lse = {};  // [B,H,Lq,1], none where it is null
  TensorView<T> grad_q, grad_k, grad_v;    // overwritten, shapes of q, k and v
  AttentionParamGradients param_grads = {};
};

namespace detail {

/// The tensors of a forward pass, as the kernels see them: element types are known at run time.
struct ForwardProblem {
  StoredTensor q, k, v, output;
  TensorView<double> lse;
  Index features = q.dim();  // numbers in a row of q or k as it is multiplied

  Index batch() const { return q.shape[0]; }
  Index heads() const { return q.shape[1]; }
  /// What a pass reads and writes of each head, in about that order.
  auto streamed() const { return std::tie(q, k, v, output); }
};

/// The same of a backward pass.
struct BackwardProblem : ForwardProblem {
  StoredTensor grad_output;
  TensorView<const double> grad_lse;
  StoredTensor grad_q, grad_k, grad_v;
  AttentionParamGradients param_grads;

  auto streamed() const { return std::tie(k, v, q, grad_output, output, grad_q, grad_k, grad_v); }
};

/// One head of q in one batch.
struct HeadIndex {
  Index b, h;
};

/// Calls f<HeadDim>() with the head dim as a constant where that pays, else with Eigen::Dynamic. Double is the
/// reference type: one general kernel is enough.
template <class Scalar, class F>
void with_head_dim(Index dim, Index value_dim, F&& f) {
  if constexpr (std::is_same_v<Scalar, float>) {
    if (dim == value_dim) {
      switch (dim) {
        case 16:
          return f.template operator()<16>();
        case 32:
          return f.template operator()<32>();
        case 64:
          return f.template operator()<64>();
      }
    }
  }
  f.template operator()<Eigen::Dynamic>();
}

}  // namespace detail
}  // namespace headroom::inline v0::core
