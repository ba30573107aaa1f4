#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/memory/format.hpp"
#include "headroom/plan/plan.hpp"

namespace headroom::inline v0 {

namespace detail {

/// Text as a JSON string, quotes included.
inline std::string json_string(std::string_view text) {
  std::ostringstream out;
  out << '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out << '\\' << c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out << "\\u" << std::hex << std::setw(4) << std::setfill('0') << static_cast<int>(c) << std::dec;
    } else {
      out << c;
    }
  }
  out << '"';
  return out.str();
}
inline std::string html_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  }
  return out;
}

/// Sizes without leading ones: what a batch of one adds.
inline at::IntArrayRef shape_of(const MemoryTrace::Block& block) {
  at::IntArrayRef shape(block.shape);
  while (shape.size() > 1 && shape.front() == 1) shape = shape.slice(1);
  return shape;
}

inline std::string json_block(const Plan& plan, const MemoryTrace::Block& block) {
  std::ostringstream out;
  out << "{\"bytes\": " << block.bytes << ", \"shape\": [";
  const at::IntArrayRef shape = shape_of(block);
  for (size_t i = 0; i < shape.size(); ++i) out << (i == 0 ? "" : ", ") << shape[i];
  out << "], \"dtype\": " << json_string(c10::toString(block.dtype))
      << ", \"module\": " << json_string(plan.module_of(block))
      << ", \"operator\": " << json_string(plan.operator_of(block))
      << ", \"phase\": " << json_string(plan.phase_of(block))
      << ", \"use\": " << json_string(kMemoryUseNames[static_cast<size_t>(block.use)]) << "}";
  return out.str();
}

/// The largest entries of a table, largest first.
template <class Value>
std::vector<std::pair<std::string, Value>> largest_first(const std::map<std::string, Value>& table, size_t count) {
  std::vector<std::pair<std::string, Value>> rows(table.begin(), table.end());
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  if (rows.size() > count) rows.resize(count);
  return rows;
}

inline std::string named(const std::string& module) { return module.empty() ? "(outside of modules)" : module; }

/// "80.89 GiB [431, 12, 2049, 2049] in encoder.layers.0.frequency.attention by aten::matmul".
inline std::string block_text(const Plan& plan, const MemoryTrace::Block& block) {
  std::ostringstream out;
  out << format_bytes(block.bytes) << " " << shape_of(block) << " in " << named(plan.module_of(block)) << " by "
      << plan.operator_of(block) << " (" << plan.phase_of(block) << ")";
  return out.str();
}

inline std::string scaled_flops(double flops) {
  constexpr std::array units{" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"};
  size_t unit = 0;
  while (flops >= 1000 && unit + 1 < units.size()) {
    flops /= 1000;
    ++unit;
  }
  std::ostringstream out;
  out << std::setprecision(3) << flops << units[unit];
  return out.str();
}

}  // namespace detail

/// The plan as a table for people.
inline void print_plan(std::ostream& out, const Plan& plan) {
  const auto row = [&](std::string_view name, int64_t bytes) {
    out << "  " << std::left << std::setw(40) << name << std::right << std::setw(12) << format_bytes(bytes) << "\n";
  };
  out << plan.device.name << ": " << format_bytes(plan.device.total_bytes) << ", " << format_bytes(plan.budget)
      << " for tensors\n"
      << (plan.fits ? "fits" : "does not fit") << ": peak " << format_bytes(plan.peak_bytes) << " (" << plan.peak_bytes
      << " bytes), reserved " << format_bytes(plan.reserved_bytes);
  if (plan.fits) {
    out << ", headroom " << format_bytes(plan.budget - plan.reserved_bytes);
  }
  out << "\nwith libraries and context about " << format_bytes(plan.occupied_bytes());
  out << "\n" << detail::scaled_flops(plan.flops);
  if (plan.device.flops_per_second > 0) {
    out << ", at least " << std::setprecision(3) << plan.flops / plan.device.flops_per_second << " s";
  }
  if (!plan.estimated.empty()) {
    out << "\nan estimate: the CPU's library chooses what it needs in";
    for (const std::string& name : plan.estimated) out << " " << name;
  }
  out << "\nthe peak is made of\n";
  for (size_t use = 0; use < plan.parts.size(); ++use) row(kMemoryUseNames[use], plan.parts[use]);
  out << "highest while\n";
  for (const auto& [phase, bytes] : plan.by_phase) row(phase, bytes);
  out << "who holds the peak\n";
  for (const auto& [module, bytes] : detail::largest_first(plan.by_module, 8)) row(detail::named(module), bytes);
  out << "the largest tensors at the peak\n";
  for (size_t i = 0; i < std::min<size_t>(plan.at_peak.size(), 5); ++i) {
    out << "  " << detail::block_text(plan, plan.trace.blocks[plan.at_peak[i]]) << "\n";
  }
  if (const auto* largest = plan.largest_block(); largest != nullptr) {
    out << "the largest of all\n  " << detail::block_text(plan, *largest) << "\n";
  }
}

/// Why a plan does not fit: what asks for memory that is not there, and who holds the rest. Empty when it fits.
inline std::string explain(const Plan& plan) {
  if (plan.fits) return {};
  const auto& blocks = plan.trace.blocks;
  const MemoryTrace::Block& asks = blocks[*plan.first_over];
  std::map<std::string, int64_t> holders;
  int64_t live = 0;
  for (const auto& block : blocks) {
    if (block.begin >= asks.begin || block.end <= asks.begin) continue;
    live += block.bytes;
    holders[detail::named(plan.module_of(block)) + ", " +
            std::string(kMemoryUseNames[static_cast<size_t>(block.use)])] += block.bytes;
  }
  std::ostringstream out;
  out << "out of memory: " << detail::block_text(plan, asks) << "\n"
      << format_bytes(live) << " of " << format_bytes(plan.budget) << " are held then, most of it by\n";
  for (const auto& [name, bytes] : detail::largest_first(holders, 4)) {
    out << "  " << format_bytes(bytes) << "  " << name << "\n";
  }
  out << "with room for everything the peak would be " << format_bytes(plan.peak_bytes) << "\n";
  return out.str();
}

/// The plan as a JSON document.
inline std::string plan_json(const Plan& plan) {
  std::ostringstream out;
  const auto table = [&](const char* name, const auto& rows, bool last = false) {
    out << "  \"" << name << "\": {";
    bool first = true;
    for (const auto& [key, value] : rows) {
      out << (std::exchange(first, false) ? "" : ", ") << detail::json_string(key) << ": " << std::setprecision(17)
          << value;
    }
    out << "}" << (last ? "\n" : ",\n");
  };
  out << "{\n  \"device\": " << detail::json_string(plan.device.name) << ",\n  \"budget_bytes\": " << plan.budget
      << ",\n  \"fits\": " << (plan.fits ? "true" : "false") << ",\n  \"peak_bytes\": " << plan.peak_bytes
      << ",\n  \"reserved_bytes\": " << plan.reserved_bytes << ",\n  \"occupied_bytes\": " << plan.occupied_bytes()
      << ",\n  \"flops\": " << std::setprecision(17) << plan.flops << ",\n";
  std::vector<std::pair<std::string, int64_t>> parts;
  for (size_t use = 0; use < plan.parts.size(); ++use) parts.emplace_back(kMemoryUseNames[use], plan.parts[use]);
  out << "  \"estimated\": [";
  for (size_t i = 0; i < plan.estimated.size(); ++i) {
    out << (i == 0 ? "" : ", ") << detail::json_string(plan.estimated[i]);
  }
  out << "],\n";
  table("parts", parts);
  table("by_phase", plan.by_phase);
  table("by_module", plan.by_module);
  table("by_operator", plan.by_operator);
  table("flops_by_operator", plan.flops_by_operator);
  table("flops_by_phase", plan.flops_by_phase);
  out << "  \"largest_at_peak\": [";
  for (size_t i = 0; i < std::min<size_t>(plan.at_peak.size(), 10); ++i) {
    out << (i == 0 ? "\n    " : ",\n    ") << detail::json_block(plan, plan.trace.blocks[plan.at_peak[i]]);
  }
  out << "\n  ],\n";
  if (plan.first_over) {
    out << "  \"out_of_memory\": " << detail::json_block(plan, plan.trace.blocks[*plan.first_over]) << ",\n";
  }
  out << "  \"largest_allocation\": "
      << (plan.largest_block() != nullptr ? detail::json_block(plan, *plan.largest_block()) : "null") << "\n}\n";
  return out.str();
}

/// Writes the plan as a trace that Perfetto (ui.perfetto.dev) opens: operators, and counters of live bytes by use. A
/// microsecond is an event. About 150 bytes an operator and as many for each allocation and release.
inline void write_plan_trace(std::ostream& out, const Plan& plan) {
  out << "{\"displayTimeUnit\": \"ns\", \"traceEvents\": [\n"
      << R"({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "plan"}})";
  for (const auto& op : plan.trace.operators) {
    const int64_t end = op.end == MemoryTrace::kForever ? plan.trace.events : op.end;
    const auto name_of = [&](int32_t name) {
      return detail::json_string(name < 0 ? std::string() : plan.trace.names[static_cast<size_t>(name)]);
    };
    out << ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": 1, \"ts\": " << op.begin << ", \"dur\": " << end - op.begin
        << ", \"name\": " << name_of(op.name) << ", \"cat\": " << name_of(op.phase)
        << ", \"args\": {\"module\": " << name_of(op.module) << "}}";
  }
  std::array<int64_t, kMemoryUses> live{};
  for (const auto& event : detail::block_events(plan.trace)) {
    const auto& block = plan.trace.blocks[event.block];
    live[static_cast<size_t>(block.use)] += event.begins ? block.bytes : -block.bytes;
    out << ",\n{\"ph\": \"C\", \"pid\": 1, \"ts\": " << event.time << ", \"name\": \"bytes\", \"args\": {";
    for (size_t use = 0; use < live.size(); ++use) {
      out << (use == 0 ? "" : ", ") << detail::json_string(kMemoryUseNames[use]) << ": " << live[use];
    }
    out << "}}";
  }
  out << "\n]}\n";
}

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
inline void write_timeline(std::ostream& out, const Plan& plan, const std::vector<const char*>& colours) {
  constexpr int64_t kWidth = 1000, kHeight = 320, kLeft = 90, kBelow = 24;
  const Timeline timeline(plan, kWidth);
  const auto y = [&](int64_t bytes) {
    return static_cast<double>(kHeight) *
           (1 - static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(plan.peak_bytes, 1)) / 1.05);
  };
  out << std::fixed << std::setprecision(1) << "<svg id=\"timeline\" width=\"" << kLeft + kWidth << "\" height=\""
      << kHeight + kBelow << "\" viewBox=\"" << -kLeft << " 0 " << kLeft + kWidth << " " << kHeight + kBelow
      << "\" role=\"img\">\n<rect width=\"" << kWidth << "\" height=\"" << kHeight << "\" fill=\"#f7f7f7\"/>\n";
  const int64_t step =
      int64_t{1} << static_cast<int>(std::log2(static_cast<double>(std::max<int64_t>(plan.peak_bytes, 4)) / 3));
  for (int64_t bytes = step; bytes <= plan.peak_bytes; bytes += step) {
    out << "<line x2=\"" << kWidth << "\" y1=\"" << y(bytes) << "\" y2=\"" << y(bytes)
        << "\" stroke=\"#ddd\"/><text class=\"size\" x=\"-8\" y=\"" << y(bytes) + 4 << "\">" << format_bytes(bytes)
        << "</text>\n";
  }
  std::vector<int64_t> below(timeline.columns.size());
  for (size_t use = 0; use < static_cast<size_t>(kMemoryUses); ++use) {
    const std::vector<int64_t> lower = below;
    out << "<path fill=\"" << colours[use] << "\" d=\"";
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
inline std::string plan_html(const Plan& plan, std::string_view title = "Memory plan") {
  const std::vector<const char*> colours{"#4c78a8", "#f58518", "#e45756", "#54a24b", "#72b7b2", "#b279a2"};
  std::ostringstream out;
  out << "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>" << detail::html_text(title)
      << "</title>\n<style>body{font:14px system-ui,sans-serif;max-width:1100px;margin:2em auto;color:#222}"
         "td,th{padding:2px 12px 2px 0;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}"
         "text{font-size:12px;fill:#555}.size{text-anchor:end}.phase{text-anchor:middle}"
         "i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}pre{white-space:pre-wrap}</style></"
         "head><body>\n"
      << "<h1>" << detail::html_text(title) << "</h1>\n<p id=\"verdict\">" << detail::html_text(plan.device.name)
      << ": " << (plan.fits ? "fits" : "does not fit") << ", peak " << format_bytes(plan.peak_bytes) << " of "
      << format_bytes(plan.budget) << ", reserved " << format_bytes(plan.reserved_bytes) << "</p>\n";
  detail::write_timeline(out, plan, colours);
  out << "<table><tr><th>at the peak<th>";
  for (size_t use = 0; use < plan.parts.size(); ++use) {
    out << "<tr><td><i style=\"background:" << colours[use] << "\"></i>" << kMemoryUseNames[use] << "<td class=\"n\">"
        << format_bytes(plan.parts[use]);
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
  out << "</body></html>\n";
  return out.str();
}

}  // namespace headroom::inline v0
