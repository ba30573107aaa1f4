#pragma once

#include <array>
#include <ostream>
#include <string>
#include <string_view>

// What the web pages of this library have in common: one file each, which loads nothing, in light and in dark.

namespace headroom::inline v0::detail {

inline std::string html_text(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
  }
  return out;
}

/// Of lines and areas that lie side by side.
inline constexpr std::array kPageColours = {"#4c78a8", "#f58518", "#e45756", "#54a24b", "#72b7b2", "#b279a2"};

/// The page up to its heading. `more` goes into its head.
inline void begin_page(std::ostream& out, std::string_view title, std::string_view more = "") {
  out << "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>" << html_text(title) << "</title>\n"
      << more
      << "<style>:root{color-scheme:light dark;--paper:#fff;--plot:#f7f7f7;--ink:#222;--mute:#555;--rule:#ddd}"
         "@media(prefers-color-scheme:dark){"
         ":root{--paper:#16181b;--plot:#1e2125;--ink:#e2e4e7;--mute:#a3a8af;--rule:#3a3f45}}"
         "body{font:14px system-ui,sans-serif;max-width:1100px;margin:2em auto;color:var(--ink);"
         "background:var(--paper)}"
         "td,th{padding:2px 12px 2px 0;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}"
         "text{font-size:12px;fill:var(--mute)}.plot{fill:var(--plot)}.rule{stroke:var(--rule)}"
         ".size{text-anchor:end}.phase{text-anchor:middle}"
         "i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}pre{white-space:pre-wrap}</style></head>"
         "<body>\n<h1>"
      << html_text(title) << "</h1>\n";
}

inline void end_page(std::ostream& out) { out << "</body></html>\n"; }

}  // namespace headroom::inline v0::detail
