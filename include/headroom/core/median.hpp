#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

namespace headroom::inline v0::core {

namespace detail {

/// The middle one of at least one number, which it may reorder; of an even count the mean of the two in the middle.
inline double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

}  // namespace detail

/// The middle value of numbers, the mean of the two middle ones of an even count; none of none.
inline std::optional<double> median(std::vector<double> values) {
  return values.empty() ? std::nullopt : std::optional(detail::median(values));
}

}  // namespace headroom::inline v0::core
