#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::core {

/// How much each sample of a segment counts where segments overlap. What several segments say of a sample is divided by
/// the sum of their weights, so only the shape matters. A weight is never below 1e-10: a window that is 0 at its ends
/// loses no sample that one segment alone covers.
class SegmentWindow {
 public:
  /// Rises to the middle and falls, to the power of `power`: the more, the sharper the transition. demucs' window.
  static SegmentWindow triangle(double power = 1) { return SegmentWindow(Shape::triangle, power, {}); }
  /// Rises from 0 over `fade` samples (a tenth of the segment when not given), is 1, and falls: the window of
  /// Music-Source-Separation-Training. With a fade of 0 or 1 every sample counts the same.
  static SegmentWindow trapezoid(std::optional<Eigen::Index> fade = {}) {
    return SegmentWindow(Shape::trapezoid, 1, fade);
  }
  /// 0.54 - 0.46·cos(2πi/(n - 1)): audio-separator's window for RoFormers.
  static SegmentWindow hamming() { return SegmentWindow(Shape::hamming, 1, {}); }
  /// 0.5 - 0.5·cos(2πi/(n - 1)): audio-separator's window for MDX models.
  static SegmentWindow hann() { return SegmentWindow(Shape::hann, 1, {}); }

  /// The weights of a segment of `length` samples, [1, length].
  /// Throws `headroom.core.segments.options` for a fade beyond half of it or a power below 1.
  template <class Scalar>
  Eigen::Array<Scalar, 1, Eigen::Dynamic> weights(Eigen::Index length) const {
    const Eigen::Index fade = fade_.value_or(length / 10);
    require(fade >= 0 && fade <= length / 2, "headroom.core.segments.options", "fade is ", fade,
            ", expected 0 to half the segment of ", length, " samples");
    require(power_ >= 1, "headroom.core.segments.options", "the power of the window is ", power_,
            ", expected at least 1");
    Eigen::Array<Scalar, 1, Eigen::Dynamic> weights(length);
    for (Eigen::Index i = 0; i < length; ++i) {
      weights(i) = static_cast<Scalar>(std::max(1e-10, weight(i, length, fade)));
    }
    return weights;
  }

 private:
  enum class Shape { triangle, trapezoid, hamming, hann };

  SegmentWindow(Shape shape, double power, std::optional<Eigen::Index> fade)
      : shape_(shape), power_(power), fade_(fade) {}

  double weight(Eigen::Index i, Eigen::Index length, Eigen::Index fade) const {
    const Eigen::Index from_end = std::min(i, length - 1 - i);
    const double cosine =
        length == 1 ? -1 : std::cos(2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(length - 1));
    switch (shape_) {
      case Shape::trapezoid:
        return from_end >= fade - 1 ? 1 : static_cast<double>(from_end) / static_cast<double>(fade - 1);
      case Shape::hamming:
        return 0.54 - 0.46 * cosine;
      case Shape::hann:
        return 0.5 - 0.5 * cosine;
      case Shape::triangle:
        break;
    }
    return std::pow(static_cast<double>(from_end + 1) / static_cast<double>((length + 1) / 2), power_);
  }

  Shape shape_;
  double power_;
  std::optional<Eigen::Index> fade_;
};

}  // namespace headroom::inline v0::core
