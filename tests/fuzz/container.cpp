// Reads what a fuzzer makes as the headers of an audio file: what they say has to lie within the file where it is said
// to be explained. The reader may throw headroom::Error and nothing else. scripts/fuzz.sh builds and runs this.

#include "headroom/audio/container.hpp"

#include <cstddef>
#include <cstdint>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  const InputInMemory input(data, size);
  const io::InputFile file(input.path(), {"headroom.audio.file.missing", "audio", "a WAV file"});
  if (const auto length = audio::container_length(file)) {
    expect(length->explained <= size);
    expect(!length->damaged_at || *length->damaged_at < size);
  }
  try {
    static_cast<void>(audio::require_whole(file, "input"));
  } catch (const Error& error) {
    expect(error.id().starts_with("headroom.audio.file."));
  }
  return 0;
}
