#pragma once

#include <ranges>
#include <string>
#include <string_view>

namespace headroom::inline v0::core {

/// "vocals, drums, bass": words as messages list them.
template <std::ranges::input_range Words>
std::string word_list(const Words& words) {
  std::string text;
  for (const std::string_view word : words) text.append(text.empty() ? "" : ", ").append(word);
  return text;
}

}  // namespace headroom::inline v0::core
