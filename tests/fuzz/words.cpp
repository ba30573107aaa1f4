// Reads what a fuzzer makes as a word of a command line or configuration that has a syntax of its own: the first byte
// says which. What a reader takes reads back the same from what is written of it, and it may throw headroom::Error and
// nothing else. scripts/fuzz.sh builds and runs this.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "examples/command_line.hpp"
#include "examples/separation_outputs.hpp"
#include "headroom/checkpoint/policy.hpp"
#include "headroom/core/error.hpp"
#include "headroom/training/bucket.hpp"
#include "headroom/training/layout.hpp"
#include "headroom/training/saved_states.hpp"
#include "headroom/training/sweep.hpp"
#include "input.hpp"

namespace {

using namespace headroom;

void read_bucket(const std::string& word) {
  const training::Bucket bucket = training::parse_bucket(word, 44100);
  expect(bucket.batch_size >= 1 && bucket.segment_length >= 1);
  expect(training::parse_bucket(to_string(bucket), 48000) == bucket);
}

void read_sweep(const std::string& word) {
  static const training::Config config;
  const training::Sweep sweep = training::parse_sweep(word, 44100, config);
  expect(!sweep.section.empty() && !sweep.key.empty() && !sweep.values.empty());
}

void read_policy(const std::string& word) {
  const StackPolicy policy(word);
  expect(policy.named_blocks() >= 0 && StackPolicy(policy.text()) == policy);
}

void read_bytes(const std::string& word) { expect(parse_bytes(word) >= 1); }

void read_name(const std::string& word) {
  const auto path = name_by(word, {{"track", "a"}, {"ext", "wav"}, {"stem", "vocals"}, {"model", "best"}});
  expect(path.is_relative() && path.has_filename() &&
         (("/out" / path).lexically_normal().string().starts_with("/out/")));
}

void read_state_name(const std::string& word) {
  const auto age = training::age_of_state(word);
  expect(!age || (*age >= 0 && training::last_state_name(*age) == word));
}

void read_nothing(const std::string& word) {  // neither is refused
  static_cast<void>(printable(word));
  expect(!training::detail::cells_of(word).empty());
}

constexpr std::array kReaders = {read_bucket, read_sweep,      read_policy, read_bytes,
                                 read_name,   read_state_name, read_nothing};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  try {
    kReaders[data[0] % kReaders.size()](std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
  } catch (const Error&) {
  }
  return 0;
}
