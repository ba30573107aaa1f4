#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headroom::inline v0::io {

namespace detail {

/// Number of insertions, deletions, substitutions and swaps of neighbours between two words.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> distance(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        distance[i][j] = i + j;
        continue;
      }
      distance[i][j] = std::min({distance[i - 1][j] + 1, distance[i][j - 1] + 1,
                                 distance[i - 1][j - 1] + static_cast<std::size_t>(a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        distance[i][j] = std::min(distance[i][j], distance[i - 2][j - 2] + 1);
      }
    }
  }
  return distance[a.size()][b.size()];
}

}  // namespace detail

/// The word of `valid` nearest to `given`, when it is near enough to be what was meant (a third of its letters differ).
/// Words of more than 200 bytes are not compared.
inline std::optional<std::string> nearest(std::string_view given, const std::vector<std::string>& valid) {
  constexpr std::size_t kLongest = 200;
  std::optional<std::string> best;
  if (given.size() > kLongest) return best;
  std::size_t best_distance = std::max<std::size_t>(2, given.size() / 3) + 1;
  for (const std::string& word : valid) {
    if (word.size() > kLongest) continue;
    if (const std::size_t distance = detail::edit_distance(given, word); distance < best_distance) {
      best = word;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace headroom::inline v0::io
