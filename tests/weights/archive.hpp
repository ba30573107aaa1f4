#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

// Weight files written out by hand, right ones and wrong ones.

namespace headroom::testing {

/// What make_files.py wrote.
inline const std::filesystem::path kWeightFiles = HEADROOM_WEIGHT_FILES;

/// A number in little-endian bytes.
inline std::string little(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> 8 * i);
  return text;
}

inline std::string safetensors_file(const std::string& header, const std::string& data) {
  return little(header.size(), 8) + header + data;
}

/// How an archive is written.
struct ZipStyle {
  bool zip64 = false;        ///< sizes and offsets stand in extra fields, as in an archive of more than 4 GiB
  std::uint16_t method = 0;  ///< 8: deflated
  std::uint16_t flags = 8;   ///< 8: sizes follow the content; 1: encrypted
  std::string behind = {};   ///< what is appended to the archive
};

/// A zip archive of stored members.
inline std::string zip_file(const std::vector<std::pair<std::string, std::string>>& members,
                            const ZipStyle& style = {}) {
  std::string file, directory;
  for (const auto& [name, content] : members) {
    const std::uint64_t header = file.size();
    const std::string common = little(style.flags, 2) + little(style.method, 2) + little(0, 8);
    file += "PK\3\4" + little(20, 2) + common + little(0, 8) + little(name.size(), 2) + little(5, 2) + name + "extra" +
            content + "PK\7\10" + little(0, 4) + little(content.size(), 4) + little(content.size(), 4);
    const std::string extra = little(0xcafe, 2) + little(2, 2) + "??" +
                              (style.zip64 ? little(1, 2) + little(24, 2) + little(content.size(), 8) +
                                                 little(content.size(), 8) + little(header, 8)
                                           : "");
    const auto field = [&](std::uint64_t value) { return little(style.zip64 ? 0xffffffff : value, 4); };
    directory += "PK\1\2" + little(20, 2) + little(20, 2) + common + field(content.size()) + field(content.size()) +
                 little(name.size(), 2) + little(extra.size(), 2) + little(3, 2) + little(0, 8) + field(header) + name +
                 extra + "how";
  }
  const std::uint64_t begin = file.size();
  file += directory;
  if (style.zip64) {
    const std::uint64_t end = file.size();
    file += "PK\6\6" + little(44, 8) + little(45, 2) + little(45, 2) + little(0, 8) + little(members.size(), 8) +
            little(members.size(), 8) + little(directory.size(), 8) + little(begin, 8) + "PK\6\7" + little(0, 4) +
            little(end, 8) + little(1, 4);
  }
  const std::uint64_t count = style.zip64 ? 0xffff : members.size();
  return file + "PK\5\6" + little(0, 4) + little(count, 2) + little(count, 2) + little(directory.size(), 4) +
         little(style.zip64 ? 0xffffffff : begin, 4) + little(0, 2) + style.behind;
}

// ---- pickle programs, piece by piece ----

inline std::string pickle_text(const std::string& text) { return "X" + little(text.size(), 4) + text; }
inline std::string pickle_integer(std::int64_t value) {
  return "\x8a\x08" + little(static_cast<std::uint64_t>(value), 8);
}
inline std::string pickle_tuple(const std::vector<std::string>& items) {
  std::string program = "(";
  for (const std::string& item : items) program += item;
  return program + "t";
}
inline std::string pickle_tuple_of(const std::vector<std::int64_t>& values) {
  std::vector<std::string> items;
  for (const std::int64_t value : values) items.push_back(pickle_integer(value));
  return pickle_tuple(items);
}
inline std::string pickle_dict(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string program = "}(";
  for (const auto& [key, value] : members) program += pickle_text(key) + value;
  return program + "u";
}
inline std::string pickled(const std::string& value) { return "\x80\x02" + value + "."; }

/// A tensor of a storage.
struct PickledTensor {
  std::string type = "FloatStorage";
  std::string key = "0";
  std::int64_t elements = 6, offset = 0;
  std::vector<std::int64_t> shape = {2, 3}, strides = {3, 1};
};
inline std::string pickle_tensor(const PickledTensor& tensor) {
  const std::string storage =
      pickle_tuple({pickle_text("storage"), "ctorch\n" + tensor.type + "\n", pickle_text(tensor.key),
                    pickle_text("cpu"), pickle_integer(tensor.elements)}) +
      "Q";
  return "ctorch._utils\n_rebuild_tensor_v2\n" +
         pickle_tuple({storage, pickle_integer(tensor.offset), pickle_tuple_of(tensor.shape),
                       pickle_tuple_of(tensor.strides), "\x89", "}"}) +
         "R";
}

/// What torch.save would write of a pickled object and one storage of 24 bytes.
inline std::string torch_file(const std::string& object, const ZipStyle& style = {}) {
  return zip_file({{"archive/data.pkl", pickled(object)},
                   {"archive/byteorder", "little"},
                   {"archive/data/0", "abcdefghijklmnopqrstuvwx"},
                   {"archive/version", "3\n"}},
                  style);
}

}  // namespace headroom::testing
