// Reads what a fuzzer makes as a saved state, up to the archive in it, which is as trusted as the program that wrote
// it. The reader may throw headroom::Error and nothing else. scripts/fuzz.sh builds and runs this.

#define HEADROOM_TRAINING_HERE

#include "headroom/training/state.hpp"

#include <cstddef>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  const InputInMemory input(data, size);
  const bool has_end = training::is_saved_state(input.path());
  try {
    expect(training::detail::read_archive(input.path()).size() < size && has_end);
  } catch (const Error&) {
  }
  return 0;
}
