#pragma once

#include "headroom/core/attention/own_terms.hpp"
#include "headroom/core/scratch.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// Where a term leaves what the backward pass needs of a tile of scores, [rows][width] each; null where nobody does.
template <class Scalar>
struct ScoreMemory {
  Scalar* buffer;               // of ScoreFunction::buffer_size()
  Scalar* cap_slope = nullptr;  // derivative of the softcap
  Scalar* own_slope = nullptr;  // of a score function of one's own
  Scalar* own_input = nullptr;  // what that was given
  Piece behind;                 // the buffer, in the place of own_input

  /// Of the backward pass, whose tiles have up to `size` scores. There is room for `spare` numbers behind the buffer:
  /// for others, before a tile is scored and after it was differentiated.
  ScoreMemory(Scratch& scratch, const AttentionParams& params, Index size, Index buffer_size, Index spare) {
    const bool keeps_input = params.score_function.tables() > 0;
    const auto take = [&](bool is_needed) { return is_needed ? scratch.take<Scalar>(size) : nullptr; };
    buffer = scratch.take<Scalar>(buffer_size);
    behind = scratch.take_piece<Scalar>(std::max(spare, keeps_input ? size : 0));
    cap_slope = take(params.softcap > 0);
    own_slope = take(static_cast<bool>(params.score_function));
    own_input = keeps_input ? behind.as<Scalar>() : nullptr;
  }
  /// Of the forward pass.
  explicit ScoreMemory(Scalar* score_buffer) : buffer(score_buffer) {}
};

/// What happens to the scores of a problem: its terms in their order. Plain scores, changed by no term, do not pass
/// through it: they stay the products q·kᵀ, bit for bit the same in both passes.
template <class Scalar>
class ScoreFunction {
 public:
  ScoreFunction(const AttentionParams& params, const MaskRef& mask, const ForwardProblem& x)
      : params_(params),
        mask_(mask),
        scale_(params.scale_for(x.q.dim())),
        softcap_{params.softcap, std::abs(scale_)},
        bias_{params.bias},
        relative_bias_{params},
        slopes_{params},
        own_{params.score_function, params.first_head / std::max<Index>(x.heads(), 1)},
        sink_{params.sink},
        element_mask_{params},
        block_mask_{params},
        own_mask_{params, params.first_head / std::max<Index>(x.heads(), 1)},
        dropout_{params, x.heads()} {
    const bool changes = softcap_ || bias_ || relative_bias_ || slopes_ || own_ || hides_elements();
    // What lies between kHidden and kLeast, times a factor of nearly zero, would not be far
    in_every_tile_ = changes || std::abs(scale_) < 1e-28;
  }

  const AttentionParams& params() const { return params_; }
  const MaskRef& mask() const { return mask_; }
  const WeightDropout<Scalar>& dropout() const { return dropout_; }
  const Sink& sink() const { return sink_; }

  double scale() const { return scale_; }
  /// The sign of the scale goes into the operand that fills the lanes, which is exact.
  Scalar sign() const { return scale_ < 0 ? Scalar(-1) : Scalar(1); }
  /// Whether every tile has to go through apply(), which multiplies by |scale|. Else only tiles that a range's border
  /// crosses need it.
  bool in_every_tile() const { return in_every_tile_; }
  /// Whether more than ranges hides keys.
  bool hides_elements() const { return element_mask_ || block_mask_ || own_mask_; }
  /// What the scores of a tile still have to be multiplied by.
  double remaining_scale() const { return in_every_tile_ ? 1.0 : std::abs(scale_); }
  /// The weight of a score s is 2^(factor·s), up to normalisation.
  Scalar factor() const { return static_cast<Scalar>(remaining_scale() * std::numbers::log2e); }
  /// How far the score of a head's sink is above the score s of a tile, in units of log2.
  double sink_above(Index h, double s) const {
    // A difference of scores: a product with log2(e) would be rounded by more than what is left where both are large
    return (sink_.score(h) - s * remaining_scale()) * std::numbers::log2e;
  }

  /// Whether what hides single elements lets any query see any key.
  bool sees_any(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return block_mask_.sees_any(head, queries, keys) && element_mask_.sees_any(head, queries, keys) &&
           own_mask_.sees_any(head, queries, keys);
  }
  /// The run of keys of which these queries may see some, as far as a function says; and that of queries which may see
  /// some of these keys.
  KeyRange seen_keys(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return own_mask_.seen_keys(head, queries, keys);
  }
  KeyRange seeing_queries(HeadIndex head, KeyRange queries, KeyRange keys) const {
    return own_mask_.seeing_queries(head, queries, keys);
  }

  static Index buffer_size(Index rows, Index width) {
    return std::max<Index>(simd::kLanes<Scalar> * rows, rows + width);
  }
  /// Products become scores.
  template <class Tile>
  void apply(const Tile& tile, const ScoreMemory<Scalar>& memory) const {
    const Index count = tile.rows() * tile.width;
    Scalar factor = in_every_tile_ ? static_cast<Scalar>(std::abs(scale_)) : Scalar(1);
    if (softcap_) {
      softcap_.apply(tile.data, count, memory.cap_slope);
      factor = 1;
    }
    if (bias_) {
      bias_.apply(tile, factor, memory.buffer);
      factor = 1;
    } else if (factor != 1 && (relative_bias_ || slopes_ || !own_)) {
      for (Index i = 0; i < count; ++i) tile.data[i] *= factor;
      factor = 1;
    }
    if (relative_bias_) relative_bias_.apply(tile, memory.buffer);
    if (slopes_) slopes_.apply(tile);
    if (own_) {
      own_.apply(tile, factor, memory.own_slope, memory.own_input);
    } else if (bias_ || relative_bias_ || slopes_) {
      lift(tile.data, count);
    }
    tile.hide_outside();
    if (element_mask_) element_mask_.hide(tile);
    if (block_mask_) block_mask_.hide(tile);
    if (own_mask_) own_mask_.hide(tile);
  }
  /// Gradients of a tile of scores become gradients of |scale| times the products. Adds what they contribute to those
  /// of parameters.
  template <class Tile>
  void differentiate(const Tile& grad, const ParamSums& sums, const ScoreMemory<Scalar>& memory) const {
    const Index count = grad.rows() * grad.width;
    if (own_) {
      own_.add_gradients(grad, memory.own_input, sums);
      multiply_by_slope(grad.data, memory.own_slope, count);
    }
    if (sums.any_of_tiles()) {
      bias_.add_gradients(grad, sums, memory.buffer);
      slopes_.add_gradients(grad, sums);
      relative_bias_.add_gradients(grad, sums);
    }
    if (softcap_) multiply_by_slope(grad.data, memory.cap_slope, count);
  }

 private:
  /// Scores that are seen are above kHidden, as far as they are finite.
  static void lift(Scalar* scores, Index count) {
    for (Index i = 0; i < count; i += simd::kLanes<Scalar>) {
      simd::store(scores + i, lifted<Scalar>(simd::load(scores + i)));
    }
  }

  const AttentionParams& params_;
  MaskRef mask_;
  double scale_;
  Softcap<Scalar> softcap_;
  Bias<Scalar> bias_;
  RelativeBias<Scalar> relative_bias_;
  Slopes<Scalar> slopes_;
  OwnScores<Scalar> own_;
  Sink sink_;
  ElementMask<Scalar> element_mask_;
  BlockMask<Scalar> block_mask_;
  OwnMask<Scalar> own_mask_;
  WeightDropout<Scalar> dropout_;
  bool in_every_tile_;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
