#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "headroom/core/error.hpp"
#include "headroom/io/input_file.hpp"

namespace headroom::inline v0::audio {

/// What the headers of an audio file say about its length in bytes. libsndfile reads what is there and says nothing
/// when that is less, or more, than was promised; who wants to know asks here.
struct ContainerLength {
  std::uint64_t promised = 0;   ///< the file has at least so many
  std::uint64_t explained = 0;  ///< up to here the headers say what the bytes are
  /// Where samples begin that go on to the end of the file, since their number was not known when the header was
  /// written
  std::optional<std::uint64_t> open_end = {};
  bool ended = true;  ///< an Ogg stream has the mark of its end
  bool tags = true;   ///< libsndfile passes over tags that were appended; else it takes them for sound
};

namespace detail {

/// An unsigned number of 2, 4 or 8 bytes; 0 where there are fewer.
inline std::uint64_t stored_number(std::string_view bytes, std::size_t offset, std::size_t count, std::endian order) {
  std::uint64_t number = 0;
  if (bytes.size() < offset + count) return 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t place = order == std::endian::big ? i : count - 1 - i;
    number = number << 8 | static_cast<unsigned char>(bytes[offset + place]);
  }
  return number;
}

/// Whether a size of 32 bits stands for "not known", as programs write it that cannot go back to the header, into a
/// pipe for example: 2^32 - 1 or little less (ffmpeg), 2^31 or up to 4 KiB less (sox, arecord), 0x7f000000 (sox, AIFF).
inline bool is_placeholder(std::uint64_t size) {
  constexpr std::uint64_t kPage = 4096;
  const auto in = [&](std::uint64_t first, std::uint64_t count) { return size >= first && size - first <= count; };
  return in(0x7fffffff - kPage + 1, kPage) || in(0xffffffff - kPage + 1, kPage - 1) || in(0x7f000000, kPage);
}

/// How a family of files is made of chunks: a name, a size, and so many bytes.
struct ChunkLayout {
  std::uint64_t first;     ///< where the first chunk begins
  std::size_t name, size;  ///< bytes of a name and of a size
  std::endian order;
  bool size_counts_header;   ///< as in Wave64
  std::uint64_t alignment;   ///< of the next chunk
  std::string_view samples;  ///< name of the chunk that holds them
};

/// Whether four bytes can be the name of a chunk.
inline bool is_chunk_name(std::string_view name) {
  return name.size() >= 4 && std::ranges::all_of(name.substr(0, 4), [](char c) { return c >= 0x20 && c < 0x7f; });
}

/// The length of a file of chunks. `whole` is what the header says of all of it, 0 for nothing; `long_samples` is the
/// size of the samples where that in their chunk is a placeholder, as in RF64.
inline ContainerLength length_of_chunks(const io::InputFile& file, const ChunkLayout& layout, std::uint64_t whole,
                                        std::uint64_t long_samples) {
  constexpr int kMostChunks = 100'000;
  const std::size_t header = layout.name + layout.size;
  ContainerLength length{.promised = whole, .explained = std::min(layout.first, file.size())};
  bool samples_seen = false;
  for (std::uint64_t at = layout.first, chunks = 0; chunks < kMostChunks; ++chunks) {
    const std::string bytes = file.read(at, header);
    if (bytes.size() < header || !is_chunk_name(bytes)) break;
    std::uint64_t size = stored_number(bytes, layout.name, layout.size, layout.order);
    const bool samples = !samples_seen && bytes.starts_with(layout.samples);
    samples_seen = samples_seen || samples;
    if (samples) {
      const bool placeholder = layout.size == 4 ? is_placeholder(size) : size == ~std::uint64_t{0};
      const bool none = size == (layout.size_counts_header ? header : 0) && !is_chunk_name(file.read(at + header, 4));
      if (placeholder && long_samples > 0) {
        size = long_samples;
      } else if (placeholder || (none && at + header < file.size())) {
        return {.explained = file.size(), .open_end = at + header};
      }
    }
    if (layout.size_counts_header) size = std::max<std::uint64_t>(size, header) - header;
    const std::uint64_t end = at + header + std::min<std::uint64_t>(size, std::numeric_limits<std::int64_t>::max());
    if (samples) length.promised = std::max(length.promised, end);
    if (end > file.size()) break;
    length.explained = end;
    at = (end + layout.alignment - 1) / layout.alignment * layout.alignment;
  }
  return length;
}

/// WAV, little-endian or big-endian, RF64 and BW64.
inline ContainerLength length_of_wave(const io::InputFile& file, std::string_view header) {
  const std::endian order = header.starts_with("RIFX") ? std::endian::big : std::endian::little;
  std::uint64_t whole = stored_number(header, 4, 4, order), samples = 0;
  if (!header.starts_with("RIF") && header.substr(12).starts_with("ds64")) {
    samples = stored_number(header, 28, 8, order);
    if (is_placeholder(whole)) whole = stored_number(header, 20, 8, order);
  }
  // A last chunk of odd size is followed by a byte that some writers count and leave out
  whole = whole == 0 || is_placeholder(whole) ? 0 : whole + 8 - whole % 2;
  if (whole == file.size() + 1) --whole;
  return length_of_chunks(file, {12, 4, 4, order, false, 2, "data"}, whole, samples);
}

/// Sony Wave64: names of 16 bytes, sizes of 8 that count both.
inline ContainerLength length_of_wave64(const io::InputFile& file, std::string_view header) {
  ContainerLength length = length_of_chunks(file, {40, 16, 8, std::endian::little, true, 8, "data"},
                                            stored_number(header, 16, 8, std::endian::little), 0);
  length.tags = false;
  return length;
}

/// AIFF and AIFC.
inline ContainerLength length_of_aiff(const io::InputFile& file, std::string_view header) {
  const std::uint64_t whole = stored_number(header, 4, 4, std::endian::big);
  return length_of_chunks(file, {12, 4, 4, std::endian::big, false, 2, "SSND"},
                          whole == 0 || is_placeholder(whole) ? 0 : whole / 2 * 2 + 8, 0);
}

/// Sun and NeXT, big-endian or little-endian: a header and samples.
inline ContainerLength length_of_au(const io::InputFile& file, std::string_view header) {
  const std::endian order = header.starts_with(".snd") ? std::endian::big : std::endian::little;
  const std::uint64_t begin = stored_number(header, 4, 4, order), size = stored_number(header, 8, 4, order);
  if (is_placeholder(size) || (size == 0 && begin < file.size())) return {.explained = file.size(), .open_end = begin};
  return {.promised = begin + size, .explained = std::min(begin + size, file.size())};
}

/// Ogg: the last page has the mark of the stream's end, and is whole.
inline ContainerLength length_of_ogg(const io::InputFile& file) {
  constexpr std::uint64_t kLongestPage = 65307;
  const std::uint64_t begin = file.size() - std::min(file.size(), 2 * kLongestPage);
  const std::string end = file.read(begin, file.size() - begin);
  ContainerLength length{.explained = file.size(), .ended = false, .tags = false};
  for (std::size_t page = end.rfind("OggS"); page != std::string::npos && page + 27 <= end.size();
       page = page == 0 ? std::string::npos : end.rfind("OggS", page - 1)) {
    const std::size_t lacing = static_cast<unsigned char>(end[page + 26]);
    std::size_t bytes = 27 + lacing;
    for (std::size_t i = 0; i < lacing && page + 27 + i < end.size(); ++i) {
      bytes += static_cast<unsigned char>(end[page + 27 + i]);
    }
    if (page + bytes > end.size()) continue;  // cut, or no page but bytes that look like the begin of one
    length.ended = (end[page + 5] & 4) != 0;
    length.explained = begin + page + bytes;
    break;
  }
  return length;
}

/// Whether what follows the last chunk is no lost sound: tags that other programs append, or too little to matter.
inline bool is_appendix(const io::InputFile& file, std::uint64_t begin) {
  constexpr std::uint64_t kLittle = 1 << 16;
  const std::string tag = file.read(begin, 8);
  return file.size() - begin <= kLittle || tag.starts_with("ID3") || tag.starts_with("TAG") ||
         tag.starts_with("APETAGEX") || tag.starts_with("LYRICS");
}

}  // namespace detail

/// What the headers of a WAV (RIFF, RIFX, RF64, BW64), Wave64, AIFF, AU, CAF or Ogg file say of its length; none for
/// other files. FLAC and MP3 need no more than their number of frames, which libsndfile knows.
inline std::optional<ContainerLength> container_length(const io::InputFile& file) {
  const std::string header = file.read(0, 40);
  const auto begins = [&](std::initializer_list<const char*> names) {
    return std::ranges::any_of(names, [&](const char* name) { return header.starts_with(name); });
  };
  if (begins({"RIFF", "RIFX", "RF64", "BW64"})) return detail::length_of_wave(file, header);
  if (begins({"riff\x2e\x91\xcf\x11"})) return detail::length_of_wave64(file, header);
  if (begins({"FORM"})) return detail::length_of_aiff(file, header);
  if (begins({".snd", "dns."})) return detail::length_of_au(file, header);
  if (begins({"caff"})) return detail::length_of_chunks(file, {8, 4, 8, std::endian::big, false, 1, "data"}, 0, 0);
  if (begins({"OggS"})) return detail::length_of_ogg(file);
  return std::nullopt;
}

/// Refuses a file that ends before its headers say, or goes on where they say nothing of it: a size that has 32 bits
/// and needs more leaves the rest. Throws headroom.audio.file.truncated and headroom.audio.file.length.
inline void require_whole(const io::InputFile& file, const std::filesystem::path& path) {
  const std::optional<ContainerLength> length = container_length(file);
  if (!length) return;
  require(length->promised <= file.size(), "headroom.audio.file.truncated", path, " has ", file.size(),
          " bytes, its header says ", length->promised, "; copy or download it again");
  require(length->ended, "headroom.audio.file.truncated", path, " has ", file.size(),
          " bytes, and no page that ends an Ogg stream is the last; copy or download it again");
  constexpr std::uint64_t kPadding = 8;
  const bool explained =
      file.size() - length->explained < kPadding || (length->tags && detail::is_appendix(file, length->explained));
  require(explained, "headroom.audio.file.length", path, " has ", file.size(), " bytes, its header speaks of ",
          length->explained,
          " and not of the sound that may be in the rest; write it "
          "again, e.g. ffmpeg -ignore_length 1 -i INPUT -rf64 auto OUTPUT.wav, or cut off what is no sound");
}

}  // namespace headroom::inline v0::audio
