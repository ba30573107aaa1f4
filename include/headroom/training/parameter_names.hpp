#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"
#include "headroom/io/nearest.hpp"

namespace headroom::inline v0::training {

/// Parameters by name, in the order of their module.
using NamedParameters = std::vector<std::pair<std::string, torch::Tensor>>;

/// All parameters of a module, those of its submodules with their path in front.
inline NamedParameters named_parameters(const torch::nn::Module& module) {
  NamedParameters parameters;
  for (const auto& parameter : module.named_parameters()) parameters.emplace_back(parameter.key(), parameter.value());
  return parameters;
}

/// Whether a pattern stands for a name: `*` for any text, dots included, `?` for one character.
inline bool matches(std::string_view pattern, std::string_view name) {
  std::size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p, ++n;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++, resume = n;
    } else if (star != std::string_view::npos) {
      p = star + 1, n = ++resume;  // the last star takes one character more
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

namespace detail {

/// The names most like a pattern: by the text before its first wildcard and after its last one.
inline std::vector<std::string> names_like(std::string_view pattern, std::vector<std::string> names) {
  constexpr std::size_t kShown = 3;
  const std::size_t first = std::min(pattern.find_first_of("*?"), pattern.size()), last = pattern.find_last_of("*?");
  const std::string_view head = pattern.substr(0, first);
  const std::string_view tail = last == std::string_view::npos ? "" : pattern.substr(last + 1);
  const auto distance = [&](std::string_view name) {
    const std::size_t end = std::min(tail.size(), name.size());
    const std::string_view begin = last == std::string_view::npos ? name : name.substr(0, head.size());
    return io::detail::edit_distance(head, begin) + io::detail::edit_distance(tail, name.substr(name.size() - end));
  };
  std::ranges::stable_sort(names, {}, distance);
  names.resize(std::min(names.size(), kShown));
  return names;
}

}  // namespace detail

/// The names that one of the patterns stands for. Throws headroom.training.pattern for a pattern that stands for none,
/// with the names most like it; `key` is where the patterns come from.
inline std::set<std::string> matching_names(const std::vector<std::string>& patterns,
                                            const std::vector<std::string>& names, const char* key) {
  std::set<std::string> found;
  for (const std::string& pattern : patterns) {
    std::size_t matched = 0;
    for (const std::string& name : names) {
      if (!matches(pattern, name)) continue;
      found.insert(name);
      ++matched;
    }
    require(matched > 0, "headroom.training.pattern", key, ": no parameter has a name like ", pattern,
            " (* stands for any text, ? for one character); the nearest are ",
            core::word_list(detail::names_like(pattern, names)));
  }
  return found;
}

/// Lets the parameters whose names match the patterns of training.freeze stay as they are. Throws
/// headroom.training.pattern, also where no parameter is left.
inline void freeze(torch::nn::Module& module, const std::vector<std::string>& patterns) {
  std::vector<std::string> names;
  for (const auto& [name, parameter] : named_parameters(module)) names.push_back(name);
  const std::set<std::string> frozen = matching_names(patterns, names, "training.freeze");
  require(frozen.size() < names.size(), "headroom.training.pattern", "training.freeze: the patterns stand for all ",
          names.size(), " parameters; leave one out to train something");
  for (auto& [name, parameter] : named_parameters(module)) {
    if (frozen.contains(name)) parameter.requires_grad_(false);
  }
}

}  // namespace headroom::inline v0::training
