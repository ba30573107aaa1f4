// Reads what a fuzzer makes as a checkpoint of demucs: the class of the model and the arguments that it is made with,
// as a configuration. The reader may throw headroom::Error and nothing else. scripts/fuzz.sh builds and runs this.

#include <cstddef>
#include <cstdint>
#include <span>

#include "headroom/core/error.hpp"
#include "headroom/training/demucs_checkpoint.hpp"
#include "headroom/training/json.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/pytorch.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace headroom;
  const weights::Source source{std::as_bytes(std::span(data, size)), "input"};
  try {
    const auto text = weights::read_torch_members(source, {"klass", "args", "kwargs"});
    if (text) static_cast<void>(training::detail::demucs_config(training::parse_json(*text, "input"), "input").dump());
  } catch (const Error&) {
  }
  return 0;
}
