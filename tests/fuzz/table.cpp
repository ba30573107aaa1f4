// Reads what a fuzzer makes as the table of a data set's files (CSV). The reader may throw headroom::Error and nothing
// else. scripts/fuzz.sh builds and runs this.

#include <cstddef>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "headroom/training/layout.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  const InputInMemory input(data, size);
  try {
    for (const auto& track : training::find_tracks(input.path(), training::Layout::csv, {"vocals", "drums"})) {
      expect(track.files.size() == 1 && !track.whole);
    }
  } catch (const Error&) {
  }
  return 0;
}
