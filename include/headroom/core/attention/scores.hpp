#pragma once

#include "headroom/core/attention/score_terms.hpp"

namespace headroom::inline v0::core::detail {

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
        sink_{params.sink},
        element_mask_{params},
        block_mask_{params},
        dropout_{params, x.heads()} {
    const bool changes = softcap_ || bias_ || relative_bias_ || slopes_ || hides_elements();
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
  bool hides_elements() const { return element_mask_ || block_mask_; }
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
    return block_mask_.sees_any(head, queries, keys) && element_mask_.sees_any(head, queries, keys);
  }

  static Index buffer_size(Index rows, Index width) {
    return std::max<Index>(simd::kLanes<Scalar> * rows, rows + width);
  }
  /// Products become scores. `cap_slope` [rows][width], where given, receives the derivative of the softcap; `buffer`
  /// holds buffer_size().
  template <class Tile>
  void apply(const Tile& tile, Scalar* cap_slope, Scalar* buffer) const {
    const Index count = tile.rows() * tile.width;
    Scalar factor = in_every_tile_ ? static_cast<Scalar>(std::abs(scale_)) : Scalar(1);
    if (softcap_) {
      softcap_.apply(tile.data, count, cap_slope);
      factor = 1;
    }
    if (bias_) {
      bias_.apply(tile, factor, buffer);
    } else if (factor != 1) {
      for (Index i = 0; i < count; ++i) tile.data[i] *= factor;
    }
    if (relative_bias_) relative_bias_.apply(tile, buffer);
    if (slopes_) slopes_.apply(tile);
    if (bias_ || relative_bias_ || slopes_) lift(tile.data, count);
    tile.hide_outside();
    if (element_mask_) element_mask_.hide(tile);
    if (block_mask_) block_mask_.hide(tile);
  }
  /// Gradients of scores become gradients of |scale| times the products.
  void derivative(Scalar* grad, const Scalar* cap_slope, Index count) const {
    if (cap_slope != nullptr) softcap_.derivative(grad, cap_slope, count);
  }
  /// Adds what the gradients of a tile of scores contribute to those of parameters.
  template <class Tile>
  void add_gradients(const Tile& grad, const ParamSums& sums, Scalar* buffer) const {
    if (!sums.any_of_tiles()) return;
    bias_.add_gradients(grad, sums, buffer);
    slopes_.add_gradients(grad, sums);
    relative_bias_.add_gradients(grad, sums);
  }

 private:
  /// Scores that are seen are above kHidden, as far as they are finite.
  static void lift(Scalar* scores, Index count) {
    using Packet = simd::Packet<Scalar>;
    const Packet hidden = simd::broadcast(kHidden<Scalar>), least = simd::broadcast(kLeast<Scalar>);
    for (Index i = 0; i < count; i += simd::kLanes<Scalar>) {
      const Packet s = simd::load(scores + i);
      simd::store(scores + i, simd::pselect(simd::pcmp_eq(s, hidden), least, s));
    }
  }

  const AttentionParams& params_;
  MaskRef mask_;
  double scale_;
  Softcap<Scalar> softcap_;
  Bias<Scalar> bias_;
  RelativeBias<Scalar> relative_bias_;
  Slopes<Scalar> slopes_;
  Sink sink_;
  ElementMask<Scalar> element_mask_;
  BlockMask<Scalar> block_mask_;
  WeightDropout<Scalar> dropout_;
  bool in_every_tile_;
};

}  // namespace headroom::inline v0::core::detail
