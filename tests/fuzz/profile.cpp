// Reads what a fuzzer makes as the profile of a device. The reader may throw headroom::Error and nothing else.
// scripts/fuzz.sh builds and runs this.

#include <cstddef>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "headroom/training/device_profile.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  try {
    const DeviceProfile profile = training::parse_device_profile({reinterpret_cast<const char*>(data), size}, "input");
    expect(profile.usable_bytes() > 0 && profile.usable_bytes() <= profile.total_bytes);
  } catch (const Error&) {
  }
  return 0;
}
