#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "headroom/core/finite.hpp"

namespace headroom::inline v0::training {

/// Values along the steps of a run of any length, in bounded memory: as they are while they are few, then means of
/// more and more neighbours with their least and greatest.
class Series {
 public:
  static constexpr std::size_t kMost = 600;  ///< points

  struct Point {
    double step = 0, mean = 0, least = 0, greatest = 0;
    int64_t count = 0;
  };

  explicit Series(std::string name) : name_(std::move(name)) {}

  const std::string& name() const { return name_; }
  const std::vector<Point>& points() const { return points_; }
  double last() const { return last_; }  ///< 0 before the first

  /// The next value; one that is not finite leaves no point.
  void add(int64_t step, double value) {
    if (!core::detail::is_finite(value)) return;
    last_ = value;
    if (points_.empty() || points_.back().count == width_) {
      if (points_.size() == kMost) halve();
      points_.push_back({});
    }
    merge(points_.back(), {static_cast<double>(step), value, value, value, 1});
  }

 private:
  static void merge(Point& into, const Point& more) {
    if (into.count == 0) {
      into = more;
      return;
    }
    const double share = static_cast<double>(more.count) / static_cast<double>(into.count + more.count);
    into = {into.step + share * (more.step - into.step), into.mean + share * (more.mean - into.mean),
            std::min(into.least, more.least), std::max(into.greatest, more.greatest), into.count + more.count};
  }

  void halve() {
    for (std::size_t i = 0; i < points_.size() / 2; ++i) {
      points_[i] = points_[2 * i];
      merge(points_[i], points_[2 * i + 1]);
    }
    points_.resize(points_.size() / 2);
    width_ *= 2;
  }

  std::string name_;
  std::vector<Point> points_;
  int64_t width_ = 1;  ///< values in a point
  double last_ = 0;
};

}  // namespace headroom::inline v0::training
