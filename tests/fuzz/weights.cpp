// Reads what a fuzzer makes as a weight file of the format that its first bytes tell, or as a pickle alone. A reader
// may throw headroom::Error and nothing else; what it accepts has to lie within the file. scripts/fuzz.sh builds and
// runs this.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "headroom/core/error.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/file.hpp"
#include "headroom/weights/pickle.hpp"
#include "headroom/weights/pickle_json.hpp"
#include "headroom/weights/pickle_machine.hpp"
#include "headroom/weights/pytorch.hpp"
#include "headroom/weights/state_dict.hpp"
#include "headroom/weights/tensor_record.hpp"
#include "headroom/weights/zip.hpp"
#include "input.hpp"

using namespace headroom;

namespace {

void check(const weights::Contents& contents, weights::Bytes file) {
  const std::string* before = nullptr;
  for (const weights::TensorRecord& tensor : contents.tensors) {
    expect(before == nullptr || *before < tensor.name);
    before = &tensor.name;
    expect(tensor.begin <= file.size() && tensor.bytes <= file.size() - tensor.begin);
    expect(tensor.shape.size() == tensor.strides.size() && tensor.shape.size() <= weights::kMostDimensions);
    const auto elements = weights::extent(tensor.shape, tensor.strides);
    expect(elements.has_value() && static_cast<std::uint64_t>(*elements) * bytes_of(tensor.dtype) == tensor.bytes);
  }
}

/// A pickle by itself, as it is in an archive: every storage that it describes is all of the input.
weights::Contents read_pickle_alone(const weights::Source& source) {
  const weights::Pickle pickle = weights::read_pickle(source);
  expect(pickle.end <= source.bytes.size());
  weights::detail::StorageRanges ranges;
  for (const weights::PickleStorage& storage : pickle.storages) {
    ranges.emplace(storage.key, weights::ByteRange{0, source.bytes.size()});
  }
  try {
    static_cast<void>(weights::detail::PickleJson(pickle, source).text(pickle.root));
  } catch (const Error&) {  // the state dict is looked for all the same
  }
  const weights::PickleValue dict = weights::detail::find_state_dict(pickle, source, "");
  return weights::detail::StateDictReader(pickle, source, ranges).read(dict);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const weights::Source source{std::as_bytes(std::span(data, size)), "input"};
  const bool is_pickle = size > 0 && data[0] == 0x80 && !weights::is_torch_legacy(source.bytes);
  try {
    check(is_pickle ? read_pickle_alone(source) : weights::read_contents(source), source.bytes);
  } catch (const Error&) {
  }
  return 0;
}
