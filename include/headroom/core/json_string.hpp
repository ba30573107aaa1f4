#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace headroom::inline v0::core::detail {

/// `text`, which is UTF-8, as a JSON string, quotes included.
inline std::string json_string(std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string json = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) {
      json += std::string("\\u00") + kDigits[static_cast<std::size_t>(c) >> 4] + kDigits[c & 15];
    } else {
      if (c == '"' || c == '\\') json += '\\';
      json += c;
    }
  }
  return json + '"';
}

}  // namespace headroom::inline v0::core::detail
