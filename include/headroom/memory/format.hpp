#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace headroom::inline v0 {

/// Bytes for people: "512 B", "1.50 KiB", "80.89 GiB". Binary units, as in the messages of LibTorch's allocators.
inline std::string format_bytes(std::int64_t bytes) {
  constexpr std::array units{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  // 1023.995 would print as "1024.00": it belongs to the next unit
  while (std::abs(value) >= (unit == 0 ? 1024.0 : 1023.995) && unit + 1 < units.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text.data();
}

}  // namespace headroom::inline v0
