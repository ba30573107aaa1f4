// Reads what a fuzzer makes as JSON. The reader may throw headroom::Error and nothing else, and what it takes can be
// written and read again. scripts/fuzz.sh builds and runs this.

#include "headroom/training/json.hpp"

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "headroom/core/error.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom::training;
  Json json;
  try {
    json = parse_json({reinterpret_cast<const char*>(data), size}, "input");
  } catch (const headroom::Error&) {
    return 0;
  }
  expect(parse_json(json.dump(), "what was written") == json);
  return 0;
}
