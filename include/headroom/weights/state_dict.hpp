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
#include "headroom/weights/bytes.hpp"
#include "headroom/weights/dtype.hpp"
#include "headroom/weights/pickle.hpp"
#include "headroom/weights/tensor_record.hpp"
#include "headroom/weights/zip.hpp"

namespace headroom::inline v0::weights {

namespace detail {

inline constexpr std::array<std::string_view, 5> kStateDictKeys = {"state_dict", "model_state_dict", "state", "model",
                                                                   "ema"};

/// The last value of a key in a dict.
inline std::optional<PickleValue> find_member(const Pickle& pickle, const PickleValue& dict, std::string_view key) {
  std::optional<PickleValue> found;
  const std::vector<PickleValue>& items = pickle.items(dict);
  for (std::size_t i = 0; i < items.size(); i += 2) {
    if (items[i].kind == PickleKind::text && pickle.text(items[i]) == key) found = items[i + 1];
  }
  return found;
}

/// Whether a dict has tensors by name, also of a kind that is not read.
inline bool has_tensors(const Pickle& pickle, const PickleValue& dict) {
  const std::vector<PickleValue>& items = pickle.items(dict);
  for (std::size_t i = 0; i < items.size(); i += 2) {
    const PickleValue& value = items[i + 1];
    const bool is_tensor = value.kind == PickleKind::tensor ||
                           (value.kind == PickleKind::opaque && pickle.globals[value.index].module == "torch._utils");
    if (items[i].kind == PickleKind::text && is_tensor) return true;
  }
  return false;
}

/// What the members of a dict are called, for an error.
inline std::string member_names(const Pickle& pickle, const PickleValue& dict) {
  constexpr std::size_t kMost = 12;
  const std::vector<PickleValue>& items = pickle.items(dict);
  std::string names;
  for (std::size_t i = 0; i < std::min(items.size(), 2 * kMost); i += 2) {
    if (items[i].kind == PickleKind::text) names += (names.empty() ? "" : ", ") + in_quotes(pickle.text(items[i]));
  }
  return names + (items.size() > 2 * kMost ? ", …" : "");
}

/// The dict of a file whose values are the tensors: the file's own, or one under the usual keys, at most some levels
/// down; `key`, unless empty, is the first of these keys to follow. Throws headroom.weights.state_dict.
inline PickleValue find_state_dict(const Pickle& pickle, const Source& source, std::string_view key) {
  static constexpr auto kId = "headroom.weights.state_dict";
  constexpr int kMostLevels = 4;
  PickleValue place = pickle.root;
  require(place.kind != PickleKind::opaque, kId, source.name, " holds a Python object of ",
          place.kind == PickleKind::opaque ? in_quotes(pickle.global(place)) : "",
          " and not a state dict; save one in Python: torch.save(model.state_dict(), FILE)");
  require(place.kind == PickleKind::dict, kId, source.name,
          " does not hold a dict, expected a state dict; save one in Python: torch.save(model.state_dict(), FILE)");
  if (!key.empty()) {
    const auto named = find_member(pickle, place, key);
    require(named.has_value() && named->kind == PickleKind::dict, kId, source.name, " has no dict ", in_quotes(key),
            "; it has ", member_names(pickle, place));
    place = *named;
  }
  const auto below = [&](const PickleValue& dict) {
    for (const std::string_view usual : kStateDictKeys) {
      const auto member = find_member(pickle, dict, usual);
      if (member.has_value() && member->kind == PickleKind::dict) return member;
    }
    return std::optional<PickleValue>();
  };
  for (int level = 0; level < kMostLevels; ++level) {
    const auto inner = below(place);
    if (!inner.has_value()) break;
    place = *inner;
  }
  require(has_tensors(pickle, place), kId, source.name,
          " has no tensors where a state dict should be (there, or under state_dict, model_state_dict, state, model or "
          "ema); there are: ",
          member_names(pickle, place), ". Give the name of the right one");
  return place;
}

/// Where the elements of a storage are, as a range of the whole file; none: not in the file.
using StorageRanges = std::map<std::string_view, ByteRange>;

class StateDictReader {
 public:
  StateDictReader(const Pickle& pickle, const Source& source, const StorageRanges& ranges)
      : pickle_(pickle), source_(source), ranges_(ranges) {}

  Contents read(const PickleValue& dict) const {
    std::map<std::string_view, PickleValue> members;  // of a key that comes again the last value holds
    const std::vector<PickleValue>& items = pickle_.items(dict);
    for (std::size_t i = 0; i < items.size(); i += 2) {
      if (items[i].kind == PickleKind::text) members[pickle_.text(items[i])] = items[i + 1];
    }
    Contents contents;
    for (const auto& [name, value] : members) {
      check(value.kind != PickleKind::opaque, name, "is made by ",
            value.kind == PickleKind::opaque ? in_quotes(pickle_.global(value)) : "", ", which is not read");
      if (value.kind == PickleKind::tensor) contents.tensors.push_back(record(name, pickle_.tensors[value.index]));
    }
    return contents;
  }

 private:
  template <class... What>
  void check(bool fine, std::string_view tensor, const What&... what) const {
    if (fine) [[likely]]
      return;
    fail("headroom.weights.tensor", source_.name, " (", source_.bytes.size(), " bytes) has a tensor ",
         in_quotes(tensor), " that ", what...,
         "; the file is damaged or made by something else: download it again, or save it anew in Python");
  }

  std::vector<std::int64_t> integers(std::string_view name, const PickleValue& list) const {
    std::vector<std::int64_t> values;
    check(pickle_.items(list).size() <= kMostDimensions, name, "has more than ", kMostDimensions, " dimensions");
    for (const PickleValue& item : pickle_.items(list)) {
      check(item.kind == PickleKind::integer, name, "has a size that is no integer");
      values.push_back(item.integer);
    }
    return values;
  }

  TensorRecord record(std::string_view name, const PickleTensor& tensor) const {
    const PickleStorage& storage = pickle_.storages[tensor.storage];
    const auto element = static_cast<std::int64_t>(bytes_of(storage.dtype));
    TensorRecord record{.name = std::string(name),
                        .dtype = storage.dtype,
                        .shape = integers(name, tensor.shape),
                        .strides = integers(name, tensor.strides)};
    check(record.shape.size() == record.strides.size(), name, "has other dimensions than strides");
    check(span_of_shape(record.shape, static_cast<std::size_t>(element)).has_value(), name, "has an impossible shape");
    const auto length = extent(record.shape, record.strides);
    std::int64_t end = 0;
    check(length.has_value() && tensor.offset >= 0 && !__builtin_add_overflow(tensor.offset, *length, &end) &&
              end <= storage.elements,
          name, "goes beyond its storage of ", storage.elements, " elements");
    const auto range = ranges_.find(storage.key);
    check(range != ranges_.end(), name, "has its elements under ", in_quotes(storage.key),
          ", which is not in the file");
    check(range->second.size / static_cast<std::uint64_t>(element) >= static_cast<std::uint64_t>(storage.elements),
          name, "should have ", storage.elements, " elements under ", in_quotes(storage.key), " and has ",
          range->second.size, " bytes");
    record.begin = range->second.begin + static_cast<std::uint64_t>(tensor.offset * element);
    record.bytes = static_cast<std::uint64_t>(*length * element);
    return record;
  }

  const Pickle& pickle_;
  const Source& source_;
  const StorageRanges& ranges_;
};

}  // namespace detail

}  // namespace headroom::inline v0::weights
