#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string_view>

#include "headroom/weights/bytes.hpp"

// Zip archives as torch.save writes them (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT): members are
// stored as they are, so that each is a range of the file. A directory at the end lists them; where a number there is
// too large for its field, an extra field ("zip64") has it.

namespace headroom::inline v0::weights {

/// Where a member's content is in the file.
struct ByteRange {
  std::uint64_t begin = 0, size = 0;
};

/// The members of an archive by name; the names are the file's own bytes.
using ZipMembers = std::map<std::string_view, ByteRange>;

namespace detail {

class ZipReader {
 public:
  explicit ZipReader(const Source& source) : source_(source) {}

  ZipMembers read() const {
    const Directory directory = find_directory();
    ZipMembers members;
    ByteReader reader = at(directory.begin);
    for (std::uint64_t i = 0; i < directory.members; ++i) read_entry(reader, members);
    return members;
  }

 private:
  static constexpr std::uint32_t kEntry = 0x02014b50, kLocalHeader = 0x04034b50, kEnd = 0x06054b50, kEnd64 = 0x06064b50,
                                 kLocator64 = 0x07064b50;
  static constexpr std::uint32_t kInZip64 = 0xffffffff;  // of a field whose value is elsewhere
  static constexpr std::uint64_t kEndBytes = 22, kLocator64Bytes = 20;

  struct Directory {
    std::uint64_t begin = 0, members = 0;
  };

  ByteReader at(std::uint64_t position) const { return ByteReader(source_, "headroom.weights.zip", position); }

  /// The end record is the last thing in the file, but for a comment or what a program adds, up to 64 KiB.
  std::uint64_t find_end() const {
    const std::uint64_t size = source_.bytes.size(), longest = kEndBytes + 0xffff;
    for (std::uint64_t back = kEndBytes; back <= std::min(size, longest); ++back) {
      if (at(size - back).number<std::uint32_t>() == kEnd) return size - back;
    }
    at(0).check(false, "is a zip file without the directory at its end");
    return 0;
  }

  Directory find_directory() const {
    const std::uint64_t end = find_end();
    ByteReader reader = at(end + 10);
    Directory directory{.members = reader.number<std::uint16_t>()};
    reader.take(4);
    directory.begin = reader.number<std::uint32_t>();
    if (end >= kLocator64Bytes && at(end - kLocator64Bytes).number<std::uint32_t>() == kLocator64) {
      reader.go_to(end - kLocator64Bytes + 8);
      reader.go_to(reader.number<std::uint64_t>());
      reader.check(reader.left() >= 4 && reader.number<std::uint32_t>() == kEnd64, "has no zip64 record in its place");
      reader.take(28);
      directory.members = reader.number<std::uint64_t>();
      reader.take(8);
      directory.begin = reader.number<std::uint64_t>();
    }
    return directory;
  }

  void read_entry(ByteReader& reader, ZipMembers& members) const {
    reader.check(reader.number<std::uint32_t>() == kEntry, "has something else in the place of its directory");
    reader.take(4);
    const auto flags = reader.number<std::uint16_t>(), method = reader.number<std::uint16_t>();
    reader.take(8);
    std::uint64_t stored = reader.number<std::uint32_t>(), size = reader.number<std::uint32_t>();
    const auto name_bytes = reader.number<std::uint16_t>(), extra_bytes = reader.number<std::uint16_t>(),
               comment_bytes = reader.number<std::uint16_t>();
    reader.take(8);
    std::uint64_t header = reader.number<std::uint32_t>();
    const std::string_view name = reader.text(name_bytes);
    const std::uint64_t extra_end = reader.position() + extra_bytes;
    while (extra_end >= reader.position() + 4) {
      const auto kind = reader.number<std::uint16_t>(), bytes = reader.number<std::uint16_t>();
      reader.check(reader.position() + bytes <= extra_end, "has a broken entry ", in_quotes(name), " in its directory");
      const std::uint64_t next = reader.position() + bytes;
      if (kind == 1) {
        for (std::uint64_t* const field : {&size, &stored, &header}) {  // in this order, and only those that need it
          if (*field == kInZip64 && reader.position() + 8 <= next) *field = reader.number<std::uint64_t>();
        }
      }
      reader.go_to(next);
    }
    reader.go_to(extra_end);
    reader.take(comment_bytes);
    reader.check((flags & 1) == 0 && method == 0 && stored == size, "has a member ", in_quotes(name),
                 " that is compressed or encrypted, expected stored as torch.save does; unpack it and zip it with -0");
    reader.check(members.emplace(name, locate(header, name, size)).second, "has two members ", in_quotes(name));
  }

  /// The content of a member stands behind a second header, whose texts have lengths of their own.
  ByteRange locate(std::uint64_t header, std::string_view name, std::uint64_t size) const {
    ByteReader reader = at(header);
    reader.check(reader.left() >= 30 && reader.number<std::uint32_t>() == kLocalHeader, "has no header of ",
                 in_quotes(name), " at ", header);
    reader.take(22);
    const auto name_bytes = reader.number<std::uint16_t>(), extra_bytes = reader.number<std::uint16_t>();
    reader.check(reader.text(name_bytes) == name, "has something else at ", header, " than ", in_quotes(name));
    reader.take(extra_bytes);
    reader.check(size <= reader.left(), "ends within ", in_quotes(name));
    return {reader.position(), size};
  }

  const Source& source_;
};

}  // namespace detail

/// Whether a file begins as a zip archive that has a member.
inline bool is_zip(Bytes bytes) {
  constexpr std::byte kBegin[] = {std::byte{'P'}, std::byte{'K'}, std::byte{3}, std::byte{4}};
  return bytes.size() >= 4 && std::ranges::equal(bytes.first(4), kBegin);
}

/// The members of a zip archive. Throws headroom.weights.zip where it is damaged, or has members that are not stored as
/// they are.
inline ZipMembers read_zip(const Source& source) { return detail::ZipReader(source).read(); }

}  // namespace headroom::inline v0::weights
