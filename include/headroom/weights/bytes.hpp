#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"

namespace headroom::inline v0::weights {

using Bytes = std::span<const std::byte>;

/// What a reader of a format is given: the bytes of a file, and what errors call it.
struct Source {
  Bytes bytes;
  std::string name;
};

/// A name out of a file as an error prints it: in quotes, without control characters, the middle of a long one left
/// out.
inline std::string in_quotes(std::string_view name) {
  constexpr std::size_t kLongest = 160;
  const auto plain = [](std::string_view part) {
    std::string text;
    for (const char c : part) text += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
    return text;
  };
  if (name.size() <= kLongest) return '"' + plain(name) + '"';
  return '"' + plain(name.substr(0, kLongest / 2)) + "…" + plain(name.substr(name.size() - kLongest / 2)) + '"';
}

/// Whether `text` is UTF-8 as RFC 3629 has it: shortest forms only, no surrogates, nothing above U+10FFFF.
inline bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i++]);
    const int more = first < 0x80 ? 0 : first < 0xc2 ? -1 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : first < 0xf5 ? 3 : -1;
    if (more < 0 || text.size() - i < static_cast<std::size_t>(more)) return false;
    for (int k = 0; k < more; ++k) {
      const auto next = static_cast<unsigned char>(text[i++]);
      const int least = k > 0 ? 0x80 : first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
      const int most = k > 0 ? 0xbf : first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
      if (next < least || next > most) return false;
    }
  }
  return true;
}

/// Reads numbers (little-endian) and texts of a file one after the other. Throws `id` where the file has ended.
class ByteReader {
 public:
  ByteReader(const Source& source, const char* id, std::uint64_t position = 0) : source_(source), id_(id) {
    go_to(position);
  }

  const Source& source() const { return source_; }
  std::uint64_t position() const { return position_; }
  std::uint64_t left() const { return source_.bytes.size() - position_; }
  void go_to(std::uint64_t position) {
    check(position <= source_.bytes.size(), "ends before byte ", position);
    position_ = position;
  }

  /// The next `count` bytes.
  Bytes take(std::uint64_t count) {
    check(count <= left(), "ends within the ", count, " bytes at ", position_);
    const Bytes taken = source_.bytes.subspan(position_, count);
    position_ += count;
    return taken;
  }
  std::string_view text(std::uint64_t count) {
    const Bytes taken = take(count);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  /// What is left of a line, without its end.
  std::string_view line() {
    const std::string_view rest(reinterpret_cast<const char*>(source_.bytes.data()) + position_, left());
    const std::size_t end = rest.find('\n');
    check(end != rest.npos, "ends within the line at ", position_);
    position_ += end + 1;
    return rest.substr(0, end);
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  /// Throws `id` with the file's name and `what` unless `fine`.
  template <class... What>
  void check(bool fine, const What&... what) const {
    require(fine, id_, source_.name, " (", source_.bytes.size(), " bytes) ", what...,
            "; it is damaged or made by something else: download it again");
  }

 private:
  const Source& source_;
  const char* id_;
  std::uint64_t position_ = 0;  // at most the file's size
};

}  // namespace headroom::inline v0::weights
