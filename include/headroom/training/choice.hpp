#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"

namespace headroom::inline v0::training {

/// The value of an enumeration that a configuration calls `word`. `names`: those of its values 0, 1, …, which are also
/// the choices of the field. Throws headroom.training.config for a word that is none of them.
template <class Enum, std::size_t N>
Enum chosen(const std::array<const char*, N>& names, std::string_view word) {
  const auto found = std::ranges::find(names, word);
  require(found != names.end(), "headroom.training.config", "got \"", word, "\", expected one of ",
          core::word_list(names));
  return static_cast<Enum>(found - names.begin());
}

}  // namespace headroom::inline v0::training
