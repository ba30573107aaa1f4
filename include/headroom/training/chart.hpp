#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "headroom/plan/page.hpp"
#include "headroom/training/series.hpp"

namespace headroom::inline v0::training {

/// "0.0003", "1.2e+06".
inline std::string short_number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.4g", value + 0.0);  // no -0
  return text.data();
}

namespace detail {

/// What an axis shows, and where it has marks.
struct Axis {
  double low = 0, high = 1;
  bool logarithmic = false;
  std::vector<double> marks = {};

  /// From 0, at `low`, to 1.
  double place(double value) const {
    return logarithmic ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
  }
};

/// Round numbers, about `count` of them: multiples of 1, 2 or 5 times a power of ten.
inline Axis linear_axis(double low, double high, int count) {
  if (!(high > low)) high = low + (low == 0 ? 1 : std::abs(low) / 2);
  const double rough = (high - low) / count, power = std::pow(10, std::floor(std::log10(rough)));
  const double step = power * (rough <= power ? 1 : rough <= 2 * power ? 2 : rough <= 5 * power ? 5 : 10);
  Axis axis{.low = low, .high = high};
  for (double i = std::ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; ++i) axis.marks.push_back(i * step);
  return axis;
}

/// Powers of ten.
inline Axis logarithmic_axis(double low, double high) {
  Axis axis{.low = low, .high = high, .logarithmic = true};
  const double stride = std::max(1.0, std::ceil(std::log10(high / low) / 6));
  for (double power = std::ceil(std::log10(low)); power <= std::log10(high); power += stride) {
    axis.marks.push_back(std::pow(10, power));
  }
  return axis;
}

}  // namespace detail

/// Series over the steps of a run: a line each, with the range of what its points stand for behind it.
struct Chart {
  std::string title;  ///< with the unit
  std::vector<const Series*> lines;
  bool from_zero = false;  ///< the axis begins at 0
};

namespace detail {

/// The axis of values: logarithmic where they span several powers of ten.
inline Axis value_axis(const Chart& chart) {
  double least = std::numeric_limits<double>::max(), greatest = std::numeric_limits<double>::lowest();
  for (const Series* line : chart.lines) {
    for (const Series::Point& point : line->points()) {
      least = std::min(least, point.least);
      greatest = std::max(greatest, point.greatest);
    }
  }
  if (chart.from_zero) least = std::min(least, 0.0);
  if (least > 0 && greatest > 100 * least) return logarithmic_axis(least, greatest);
  const double room = (greatest - least) * 0.05;
  return linear_axis(least < 0 || !chart.from_zero ? least - room : least, greatest + room, 5);
}

inline Axis step_axis(const Chart& chart) {
  double last = 1;
  for (const Series* line : chart.lines) last = std::max(last, line->points().empty() ? 1 : line->points().back().step);
  return linear_axis(0, last, 6);
}

/// What of a plot says where a point lies.
struct Plot {
  double width, height;
  Axis steps, values;
};

/// The lines of a chart in a plot.
inline void write_lines(std::ostream& out, const Chart& chart, const Plot& plot) {
  const auto at = [&](double step, double value) {
    return short_number(plot.steps.place(step) * plot.width) + " " +
           short_number((1 - plot.values.place(value)) * plot.height);
  };
  for (std::size_t i = 0; i < chart.lines.size(); ++i) {
    const auto& points = chart.lines[i]->points();
    if (points.empty()) continue;
    const char* colour = headroom::detail::kPageColours[i % headroom::detail::kPageColours.size()];
    std::string line, band, back;
    for (const Series::Point& point : points) {
      const char* command = line.empty() ? "M" : "L";
      line.append(command).append(at(point.step, point.mean));
      band.append(command).append(at(point.step, point.greatest));
      back.insert(0, at(point.step, point.least)).insert(0, 1, 'L');
    }
    if (points.front().count > 1) {
      out << "<path class=\"range\" fill=\"" << colour << "\" d=\"" << band << back << "Z\"/>";
    }
    out << "<path class=\"line\" stroke=\"" << colour << "\" d=\"" << line << "\"/>";
    if (points.size() <= 60) {
      for (const Series::Point& point : points) {
        out << "<circle r=\"2.5\" fill=\"" << colour << "\" transform=\"translate(" << at(point.step, point.mean)
            << ")\"><title>" << headroom::detail::html_text(chart.lines[i]->name()) << ", step "
            << short_number(point.step) << ": " << short_number(point.mean) << "</title></circle>";
      }
    }
  }
}

}  // namespace detail

/// The chart as a figure of a page: a legend with the last values, and a drawing. Nothing where there are no points.
inline void write_chart(std::ostream& out, const Chart& chart) {
  constexpr double kWidth = 440, kHeight = 180, kLeft = 64, kTop = 8, kBelow = 34;
  if (std::ranges::all_of(chart.lines, [](const Series* line) { return line->points().empty(); })) return;
  out << "<figure><figcaption><b>" << headroom::detail::html_text(chart.title) << "</b>";
  for (std::size_t i = 0; i < chart.lines.size(); ++i) {
    out << " <span><i style=\"background:" << headroom::detail::kPageColours[i % headroom::detail::kPageColours.size()]
        << "\"></i>" << headroom::detail::html_text(chart.lines[i]->name()) << " <b class=\"last\">"
        << short_number(chart.lines[i]->last()) << "</b></span>";
  }
  out << "</figcaption>\n<svg viewBox=\"" << -kLeft << " " << -kTop << " " << kLeft + kWidth + 12 << " "
      << kTop + kHeight + kBelow << "\" role=\"img\"><rect class=\"plot\" width=\"" << kWidth << "\" height=\""
      << kHeight << "\"/>";
  const detail::Axis steps = detail::step_axis(chart), values = detail::value_axis(chart);
  for (const double mark : values.marks) {
    const double y = (1 - values.place(mark)) * kHeight;
    out << "<line class=\"rule\" x2=\"" << kWidth << "\" y1=\"" << y << "\" y2=\"" << y
        << "\"/><text class=\"size\" x=\"-8\" y=\"" << y + 4 << "\">" << short_number(mark) << "</text>";
  }
  for (const double mark : steps.marks) {
    out << "<text class=\"phase\" x=\"" << steps.place(mark) * kWidth << "\" y=\"" << kHeight + 16 << "\">"
        << short_number(mark) << "</text>";
  }
  out << "<text class=\"phase\" x=\"" << kWidth / 2 << "\" y=\"" << kHeight + 31 << "\">step</text>";
  detail::write_lines(out, chart, {kWidth, kHeight, steps, values});
  out << "</svg></figure>\n";
}

}  // namespace headroom::inline v0::training
