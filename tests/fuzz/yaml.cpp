// Reads what a fuzzer makes as YAML. The reader may throw headroom::Error and nothing else, and its documents are
// small. scripts/fuzz.sh builds and runs this.

#include "headroom/training/yaml.hpp"

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "headroom/core/error.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto json = headroom::training::parse_yaml({reinterpret_cast<const char*>(data), size}, "input");
    expect(json.flatten().size() <= 20'000);
  } catch (const headroom::Error&) {
  }
  return 0;
}
