#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/separate_kernels.hpp"
#include "headroom/memory/format.hpp"
#include "headroom/plan/page.hpp"
#include "headroom/plan/report.hpp"
#include "headroom/plan/result.hpp"
#include "headroom/plan/trace.hpp"

namespace headroom::inline v0 {

namespace detail {

/// The memory of a plan along its events, in `width` columns: at the moment of its highest sum in each.
struct Timeline {
  struct Column {
    std::array<int64_t, kMemoryUses> live{};
    int64_t sum = -1;
    int32_t phase = -1;  // in the trace's names
  };
  std::vector<Column> columns;

  Timeline(const Plan& plan, int64_t width) : columns(static_cast<size_t>(width)) {
    const auto column_of = [&](int64_t time) {
      return static_cast<size_t>(
          std::clamp<int64_t>(time * width / std::max<int64_t>(plan.trace.events, 1), 0, width - 1));
    };
    Column now{.sum = 0};
    size_t at = 0;
    const auto raise = [&](size_t column) {
      if (now.sum > columns[column].sum) columns[column] = now;
    };
    const auto fill = [&](size_t end) {
      for (; at < end; ++at) raise(at);
    };
    for (const BlockEvent& event : block_events(plan.trace)) {
      const auto& block = plan.trace.blocks[event.block];
      const size_t column = column_of(event.time);
      fill(column + 1);
      const int64_t change = event.begins ? block.bytes : -block.bytes;
      now.live[static_cast<size_t>(block.use)] += change;
      now.sum += change;
      raise(column);
    }
    fill(columns.size());
    for (const auto& op : plan.trace.operators) {
      if (op.parent >= 0) continue;  // the phase of the code that called it
      const size_t last = column_of(op.end == MemoryTrace::kForever ? plan.trace.events : op.end);
      for (size_t column = column_of(op.begin); column <= last; ++column) columns[column].phase = op.phase;
    }
    for (size_t column = 1; column < columns.size(); ++column) {
      if (columns[column].phase < 0) columns[column].phase = columns[column - 1].phase;
    }
  }
};

/// A drawing of the timeline: memory by use, marks of size, the budget where it is near, and phases.
inline void write_timeline(std::ostream& out, const Plan& plan) {
  constexpr int64_t kWidth = 1000, kHeight = 320, kLeft = 90, kBelow = 24;
  const Timeline timeline(plan, kWidth);
  const auto y = [&](int64_t bytes) {
    return static_cast<double>(kHeight) *
           (1 - static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(plan.peak_bytes, 1)) / 1.05);
  };
  out << std::fixed << std::setprecision(1) << "<svg id=\"timeline\" width=\"" << kLeft + kWidth << "\" height=\""
      << kHeight + kBelow << "\" viewBox=\"" << -kLeft << " 0 " << kLeft + kWidth << " " << kHeight + kBelow
      << "\" role=\"img\">\n<rect class=\"plot\" width=\"" << kWidth << "\" height=\"" << kHeight << "\"/>\n";
  const int64_t step =
      int64_t{1} << static_cast<int>(std::log2(static_cast<double>(std::max<int64_t>(plan.peak_bytes, 4)) / 3));
  for (int64_t bytes = step; bytes <= plan.peak_bytes; bytes += step) {
    out << "<line class=\"rule\" x2=\"" << kWidth << "\" y1=\"" << y(bytes) << "\" y2=\"" << y(bytes)
        << "\"/><text class=\"size\" x=\"-8\" y=\"" << y(bytes) + 4 << "\">" << format_bytes(bytes) << "</text>\n";
  }
  std::vector<int64_t> below(timeline.columns.size());
  for (size_t use = 0; use < static_cast<size_t>(kMemoryUses); ++use) {
    const std::vector<int64_t> lower = below;
    out << "<path fill=\"" << kPageColours[use] << "\" d=\"";
    for (size_t x = 0; x < below.size(); ++x) {
      below[x] += timeline.columns[x].live[use];
      out << (x == 0 ? "M" : "L") << x << " " << y(below[x]);
    }
    for (size_t x = below.size(); x-- > 0;) out << "L" << x << " " << y(lower[x]);
    out << "Z\"><title>" << kMemoryUseNames[use] << "</title></path>\n";
  }
  if (y(plan.budget) > 0) {
    out << "<line id=\"budget\" x2=\"" << kWidth << "\" y1=\"" << y(plan.budget) << "\" y2=\"" << y(plan.budget)
        << "\" stroke=\"#c00\" stroke-dasharray=\"6 4\"><title>budget</title></line>\n";
  }
  for (size_t first = 0, end = 0; first < timeline.columns.size(); first = end) {
    const int32_t phase = timeline.columns[first].phase;
    while (end < timeline.columns.size() && timeline.columns[end].phase == phase) ++end;
    if (phase < 0 || end - first < 60) continue;  // no room for its name
    out << "<line x1=\"" << first + 1 << "\" x2=\"" << end - 1 << "\" y1=\"" << kHeight + 4 << "\" y2=\"" << kHeight + 4
        << "\" stroke=\"#888\"/><text class=\"phase\" x=\"" << (first + end) / 2 << "\" y=\"" << kHeight + 20 << "\">"
        << html_text(plan.trace.names[static_cast<size_t>(phase)]) << "</text>\n";
  }
  out << "</svg>\n";
}

}  // namespace detail

/// The plan as a web page of its own: the timeline of memory by use, and who holds the peak.
HEADROOM_KERNEL std::string plan_html(const Plan& plan, std::string_view title = "Memory plan");

#ifdef HEADROOM_DEFINE_KERNELS
HEADROOM_KERNEL std::string plan_html(const Plan& plan, std::string_view title) {
  std::ostringstream out;
  detail::begin_page(out, title);
  out << "<p id=\"verdict\">" << detail::html_text(plan.device.name) << ": " << (plan.fits ? "fits" : "does not fit")
      << ", peak " << format_bytes(plan.peak_bytes) << " of " << format_bytes(plan.budget) << ", reserved "
      << format_bytes(plan.reserved_bytes) << "</p>\n";
  detail::write_timeline(out, plan);
  out << "<table><tr><th>at the peak<th>";
  for (size_t use = 0; use < plan.parts.size(); ++use) {
    out << "<tr><td><i style=\"background:" << detail::kPageColours[use] << "\"></i>" << kMemoryUseNames[use]
        << "<td class=\"n\">" << format_bytes(plan.parts[use]);
  }
  const auto table = [&](const char* name, const auto& rows) {
    out << "</table>\n<h2>" << name << "</h2>\n<table>";
    for (const auto& [key, bytes] : rows) {
      out << "<tr><td>" << detail::html_text(detail::named(key)) << "<td class=\"n\">" << format_bytes(bytes);
    }
  };
  table("Who holds the peak: modules", detail::largest_first(plan.by_module, 20));
  table("Who holds the peak: operators", detail::largest_first(plan.by_operator, 20));
  table("Highest while", detail::largest_first(plan.by_phase, 20));
  out << "</table>\n<h2>The largest tensors at the peak</h2>\n<ol>";
  for (size_t i = 0; i < std::min<size_t>(plan.at_peak.size(), 20); ++i) {
    out << "<li>" << detail::html_text(detail::block_text(plan, plan.trace.blocks[plan.at_peak[i]]));
  }
  out << "</ol>\n";
  if (!plan.fits) out << "<h2>Why it does not fit</h2>\n<pre>" << detail::html_text(explain(plan)) << "</pre>\n";
  detail::end_page(out);
  return out.str();
}
#endif

}  // namespace headroom::inline v0
