#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "headroom/core/attention/kernels.hpp"
#include "headroom/core/error.hpp"
#include "headroom/core/word_list.hpp"

namespace headroom::inline v0::core::detail {

/// Kernels for one instruction set, and whether this processor has it.
struct KernelChoice {
  const AttentionKernels* kernels;
  bool runs_here;
};

/// The last of the choices, which go from the narrowest to the widest, that runs here; or the one that is `wanted`, by
/// the environment variable HEADROOM_ISA, unless that is empty. Throws headroom.core.instruction_set.
inline const AttentionKernels& choose_kernels(std::span<const KernelChoice> choices, std::string_view wanted) {
  const AttentionKernels* chosen = nullptr;
  std::vector<std::string_view> names;
  for (const KernelChoice& choice : choices) {
    const std::string_view name = choice.kernels->instruction_set;
    if (!choice.runs_here) {
      require(name != wanted, "headroom.core.instruction_set", "HEADROOM_ISA is ", wanted,
              ", which this processor does not have; leave it out or name one of ", word_list(names));
      continue;
    }
    names.push_back(name);
    if (wanted.empty() || name == wanted) chosen = choice.kernels;
  }
  require(
      chosen != nullptr || !wanted.empty(), "headroom.core.instruction_set",
      "this processor has no instruction set that headroom::kernels was compiled for; compile it for a narrower one "
      "as well, HEADROOM_INSTRUCTION_SETS");
  require(chosen != nullptr, "headroom.core.instruction_set", "HEADROOM_ISA is ", wanted,
          ", for which no kernels were compiled; leave it out or name one of ", word_list(names));
  return *chosen;
}

}  // namespace headroom::inline v0::core::detail
