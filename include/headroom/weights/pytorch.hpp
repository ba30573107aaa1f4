#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "headroom/core/error.hpp"
#include "headroom/core/json_string.hpp"
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/pickle.hpp"
#include "headroom/weights/pickle_json.hpp"
#include "headroom/weights/pickle_machine.hpp"
#include "headroom/weights/state_dict.hpp"
#include "headroom/weights/tensor_record.hpp"
#include "headroom/weights/zip.hpp"

// What torch.save writes. Since PyTorch 1.6 it is a zip archive: NAME/data.pkl is a pickle with all but the elements of
// tensors, and NAME/data/KEY has those of storage KEY. Before, it was five pickles (a magic number, a version, facts
// about the machine, the object, a list of keys), behind them for each key its number of elements and the elements.

namespace headroom::inline v0::weights {

namespace detail {

inline std::string_view text_of(const Source& source, const ByteRange& range) {
  return {reinterpret_cast<const char*>(source.bytes.data()) + range.begin, range.size};
}

/// The folder that data.pkl is in, with a slash at its end.
inline std::string_view top_folder(const ZipMembers& members, const Source& source) {
  constexpr std::string_view kPickle = "data.pkl";
  for (const auto& [name, range] : members) {
    if (name.ends_with(kPickle) && std::ranges::count(name, '/') <= 1) {
      const std::string_view folder = name.substr(0, name.size() - kPickle.size());
      if (folder.empty() || folder.ends_with('/')) return folder;
    }
  }
  fail("headroom.weights.format", source.name,
       " is a zip file without a data.pkl; expected a file that torch.save wrote, or a safetensors file");
}

/// The pickle of an archive.
inline Pickle read_zipped_pickle(const Source& source, const ZipMembers& members, const std::string& folder) {
  const ByteRange program = members.at(folder + "data.pkl");
  return read_pickle({source.bytes.subspan(program.begin, program.size), source.name + ": data.pkl"});
}

inline Contents read_torch_zip(const Source& source, std::string_view key) {
  const ZipMembers members = read_zip(source);
  const std::string folder(top_folder(members, source));
  if (const auto order = members.find(folder + "byteorder"); order != members.end()) {
    require(text_of(source, order->second) == "little", "headroom.weights.format", source.name,
            " was written on a big-endian machine; save it anew with PyTorch on a little-endian one");
  }
  const Pickle pickle = read_zipped_pickle(source, members, folder);
  StorageRanges ranges;
  const std::string data = folder + "data/";
  for (const auto& [name, range] : members) {
    if (name.starts_with(data)) ranges.emplace(name.substr(data.size()), range);
  }
  return StateDictReader(pickle, source, ranges).read(find_state_dict(pickle, source, key));
}

/// The pickled integer that every file of the format before the zip archives begins with.
inline constexpr std::array<std::uint8_t, 15> kLegacyBegin = {0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46,
                                                              0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, '.'};

inline StorageRanges legacy_storages(const Source& source, const Pickle& object, const Pickle& keys) {
  ByteReader reader(source, "headroom.weights.format", keys.end);
  std::map<std::string_view, const PickleStorage*> described;
  for (const PickleStorage& storage : object.storages) described.emplace(storage.key, &storage);
  StorageRanges ranges;
  reader.check(keys.root.kind == PickleKind::list, "has no list of storages");
  for (const PickleValue& key : keys.items(keys.root)) {
    const auto storage = key.kind == PickleKind::text ? described.find(keys.text(key)) : described.end();
    reader.check(storage != described.end(), "has elements of a storage that it does not describe");
    const auto elements = reader.number<std::uint64_t>();
    const std::uint64_t element = bytes_of(storage->second->dtype), begin = reader.position();
    reader.check(elements <= reader.left() / element, "ends within a storage of ", elements, " elements");
    reader.take(elements * element);
    ranges.emplace(storage->first, ByteRange{begin, elements * element});
  }
  return ranges;
}

inline Contents read_torch_legacy(const Source& source, std::string_view key) {
  std::uint64_t position = 0;
  for (int before = 0; before < 3; ++before) position = read_pickle(source, position).end;
  const Pickle object = read_pickle(source, position), keys = read_pickle(source, object.end);
  const StorageRanges ranges = legacy_storages(source, object, keys);
  return StateDictReader(object, source, ranges).read(find_state_dict(object, source, key));
}

}  // namespace detail

/// Whether a file begins as torch.save wrote it before PyTorch 1.6.
inline bool is_torch_legacy(Bytes bytes) {
  return bytes.size() > detail::kLegacyBegin.size() &&
         std::ranges::equal(bytes.first(detail::kLegacyBegin.size()), detail::kLegacyBegin, {},
                            [](std::byte byte) { return static_cast<std::uint8_t>(byte); });
}

/// The tensors of the state dict in a file that torch.save wrote, of either format. `key` is the name of the dict that
/// it is in; empty: the file's own or that under one of the usual keys. Throws headroom.weights.zip, .pickle, .format,
/// .state_dict and .tensor.
inline Contents read_torch(const Source& source, std::string_view key = "") {
  return is_zip(source.bytes) ? detail::read_torch_zip(source, key) : detail::read_torch_legacy(source, key);
}

/// Members of the dict in a zip archive that torch.save wrote, as one JSON object: what a program keeps beside weights.
/// None where the file is something else or has not all of them. See PickleJson for what becomes of values. Throws
/// headroom.weights.zip, .pickle and .format.
inline std::optional<std::string> read_torch_members(const Source& source, const std::vector<std::string>& names) {
  if (!is_zip(source.bytes)) return std::nullopt;
  const ZipMembers members = read_zip(source);
  const Pickle pickle = detail::read_zipped_pickle(source, members, std::string(detail::top_folder(members, source)));
  if (pickle.root.kind != PickleKind::dict) return std::nullopt;
  detail::PickleJson json(pickle, source);
  std::string object;
  for (const std::string& name : names) {
    const auto member = detail::find_member(pickle, pickle.root, name);
    if (!member.has_value()) return std::nullopt;
    object += (object.empty() ? "{" : ",") + core::detail::json_string(name) + ":" + json.text(*member);
  }
  return object + "}";
}

}  // namespace headroom::inline v0::weights
