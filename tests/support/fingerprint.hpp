#pragma once

#include <cstdint>
#include <set>
#include <sstream>

#include "headroom/io/atomic_file.hpp"
#include "headroom/runtime/dry_run.hpp"
#include "headroom/weights/tensors.hpp"

namespace headroom::testing {

/// As the reference scripts print it: names and shapes of the state, and the elements of parameters, among them the
/// frequencies of rotary embedding, counted once for each axis.
struct Fingerprint {
  int64_t names = 0, elements = 0;
  uint64_t hash = 0;
  bool operator==(const Fingerprint&) const = default;
};

template <class Holder, class Options>
Fingerprint fingerprint(const Options& options) {
  const DryRun shapes_only(torch::kCPU);
  const Holder model(options);
  Fingerprint result;
  std::set<const void*> seen;
  std::ostringstream lines;
  for (const auto& [name, x] : weights::tensors_of(*model)) {  // sorted
    ++result.names;
    const bool counts = seen.insert(x.unsafeGetTensorImpl()).second && !name.ends_with("inv_freqs");
    if (counts) result.elements += x.numel();
    lines << name << " " << x.sizes() << "\n";
  }
  result.hash = io::detail::fnv1a(lines.str());
  return result;
}

}  // namespace headroom::testing
