#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>

namespace headroom::inline v0::io {

/// The number that all of `text` is, in decimal: none for anything else before, in or after it, for NaN and infinity,
/// and for one that T cannot hold.
template <class T>
requires std::integral<T> || std::floating_point<T> std::optional<T> parse_number(std::string_view text) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  bool number = error == std::errc() && stop == end;
  if constexpr (std::floating_point<T>) number = number && std::abs(value) <= std::numeric_limits<T>::max();
  return number ? std::optional(value) : std::nullopt;
}

}  // namespace headroom::inline v0::io
