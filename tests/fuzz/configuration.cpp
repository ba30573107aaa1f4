// Reads what a fuzzer makes as a configuration, ours or published, JSON or YAML. The reader may throw headroom::Error
// and nothing else, and what it takes reads back the same from what is written of it. scripts/fuzz.sh builds and runs
// this.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/training/config.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom::training;
  std::string written;
  try {
    std::vector<std::string> notices;
    written = to_json(parse_config({reinterpret_cast<const char*>(data), size}, "input", &notices));
  } catch (const headroom::Error&) {
    return 0;
  }
  expect(to_json(parse_config(written, "what was written")) == written);
  return 0;
}
