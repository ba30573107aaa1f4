// Reads what a fuzzer makes as an audio file, from its header through libsndfile to samples at its begin and in its
// middle. The reader may throw headroom::Error and nothing else. scripts/fuzz.sh builds and runs this.

#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headroom/audio/reader.hpp"
#include "headroom/core/error.hpp"
#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  const InputInMemory input(data, size);
  try {
    audio::AudioReader reader(input.path());
    expect(reader.frames() > 0 && reader.channels() > 0 && reader.sample_rate() > 0);
    constexpr std::int64_t kPiece = 64;
    for (const std::int64_t first : {std::int64_t{0}, reader.frames() / 2, reader.frames()}) {
      reader.seek(first);
      const torch::Tensor samples = reader.read(kPiece);
      expect(samples.size(0) == reader.channels() && samples.size(1) == std::min(kPiece, reader.frames() - first));
    }
  } catch (const Error& error) {
    expect(audio::is_file_error(error));
  }
  return 0;
}
