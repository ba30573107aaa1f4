#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "headroom/audio/flac_frames.hpp"
#include "headroom/audio/untagged_file.hpp"
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
  bool ended = true;                             ///< an Ogg stream has the mark of its end
  std::optional<std::uint64_t> damaged_at = {};  ///< where a page of an Ogg stream is not as it was written, or missing
  bool tags = true;  ///< libsndfile passes over tags that were appended; else it takes them for sound
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
inline ContainerLength length_of_chunks(const UntaggedFile& file, const ChunkLayout& layout, std::uint64_t whole,
                                        std::uint64_t long_samples) {
  constexpr int kMostChunks = 100'000;
  const std::size_t header = layout.name + layout.size;
  const std::string own_name = file.read(0, 4);  // with which another file begins, behind this one
  ContainerLength length{.promised = whole, .explained = std::min(layout.first, file.size())};
  bool samples_seen = false;
  for (std::uint64_t at = layout.first, chunks = 0; chunks < kMostChunks; ++chunks) {
    const std::string bytes = file.read(at, header);
    if (bytes.size() < header || !is_chunk_name(bytes) || bytes.starts_with(own_name)) break;
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
inline ContainerLength length_of_wave(const UntaggedFile& file, std::string_view header) {
  const std::endian order = header.starts_with("RIFX") ? std::endian::big : std::endian::little;
  std::uint64_t whole = stored_number(header, 4, 4, order), samples = 0;
  if (!header.starts_with("RIF") && header.find("ds64") == 12) {
    samples = stored_number(header, 28, 8, order);
    if (is_placeholder(whole)) whole = stored_number(header, 20, 8, order);
  }
  // A last chunk of odd size is followed by a byte that some writers count and leave out
  whole = whole == 0 || is_placeholder(whole) ? 0 : whole + 8 - whole % 2;
  if (whole == file.size() + 1) --whole;
  return length_of_chunks(file, {12, 4, 4, order, false, 2, "data"}, whole, samples);
}

/// Sony Wave64: names of 16 bytes, sizes of 8 that count both.
inline ContainerLength length_of_wave64(const UntaggedFile& file, std::string_view header) {
  ContainerLength length = length_of_chunks(file, {40, 16, 8, std::endian::little, true, 8, "data"},
                                            stored_number(header, 16, 8, std::endian::little), 0);
  length.tags = false;
  return length;
}

/// AIFF and AIFC.
inline ContainerLength length_of_aiff(const UntaggedFile& file, std::string_view header) {
  const std::uint64_t whole = stored_number(header, 4, 4, std::endian::big);
  return length_of_chunks(file, {12, 4, 4, std::endian::big, false, 2, "SSND"},
                          whole == 0 || is_placeholder(whole) ? 0 : whole / 2 * 2 + 8, 0);
}

/// Sun and NeXT, big-endian or little-endian: a header and samples.
inline ContainerLength length_of_au(const UntaggedFile& file, std::string_view header) {
  const std::endian order = header.starts_with(".snd") ? std::endian::big : std::endian::little;
  const std::uint64_t begin = stored_number(header, 4, 4, order), size = stored_number(header, 8, 4, order);
  if (is_placeholder(size) || (size == 0 && begin < file.size())) return {.explained = file.size(), .open_end = begin};
  return {.promised = begin + size, .explained = std::min(begin + size, file.size())};
}

/// The checksum of a page, whose own four bytes count as zeros.
inline std::uint32_t ogg_checksum(std::string_view page) {
  static const auto table = [] {
    std::array<std::uint32_t, 256> values{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t value = i << 24;
      for (int bit = 0; bit < 8; ++bit) value = value << 1 ^ (value >> 31) * 0x04c11db7u;
      values[i] = value;
    }
    return values;
  }();
  std::uint32_t sum = 0;
  for (std::size_t i = 0; i < page.size(); ++i) {
    const bool own = i >= 22 && i < 26;
    sum = sum << 8 ^ table[sum >> 24 ^ (own ? 0 : static_cast<unsigned char>(page[i]))];
  }
  return sum;
}

/// The page of an Ogg file that begins at `at`; empty where no whole page does.
inline std::string ogg_page(const UntaggedFile& file, std::uint64_t at) {
  constexpr std::size_t kHeader = 27;
  std::string page = file.read(at, kHeader + 255);
  if (page.size() < kHeader || !page.starts_with("OggS")) return "";
  const std::size_t lacing = static_cast<unsigned char>(page[26]);
  std::size_t bytes = kHeader + lacing;
  for (std::size_t i = kHeader; i < std::min(kHeader + lacing, page.size()); ++i) {
    bytes += static_cast<unsigned char>(page[i]);
  }
  page = file.read(at, bytes);
  return page.size() == bytes ? page : "";
}

/// Ogg: whole pages, of each stream in their order, the last with the mark of its end. libsndfile passes over pages
/// that are damaged or missing, and reads the first of streams that follow each other.
inline ContainerLength length_of_ogg(const UntaggedFile& file) {
  ContainerLength length{.ended = false, .tags = false};
  std::map<std::uint64_t, std::uint64_t> next;  // number of each stream's next page
  bool headers_over = false;
  for (std::string page = ogg_page(file, 0); !page.empty(); page = ogg_page(file, length.explained)) {
    const auto number = [&](std::size_t offset) { return stored_number(page, offset, 4, std::endian::little); };
    const bool begins = (page[5] & 2) != 0;
    if (begins && headers_over) break;  // another stream, behind this one
    headers_over = headers_over || !begins;
    if (number(22) != ogg_checksum(page) || number(18) != next[number(14)]++) {
      length.damaged_at = length.explained;
      break;
    }
    length.ended = (page[5] & 4) != 0;
    length.explained += page.size();
  }
  return length;
}

/// So many bytes at the end of a file are too few to be lost sound that matters.
inline constexpr std::uint64_t kLittle = 1 << 16;

/// MP3: what the first frame says of all of them, when it holds a table of contents (Xing, Info) and no sound.
inline std::optional<ContainerLength> length_of_mp3(const UntaggedFile& file) {
  const std::string frame = file.read(0, 64);
  if (frame.size() < 64 || stored_number(frame, 0, 2, std::endian::big) >> 5 != 0x7ff) return std::nullopt;
  const bool mpeg1 = (frame[1] & 8) != 0, mono = (static_cast<unsigned char>(frame[3]) >> 6) == 3;
  const std::size_t table = 4 + (mpeg1 ? (mono ? 17 : 32) : (mono ? 9 : 17));
  const std::string_view name = std::string_view(frame).substr(table, 4);
  constexpr unsigned kFrames = 1, kBytes = 2;
  const auto flags = stored_number(frame, table + 4, 4, std::endian::big);
  if ((name != "Xing" && name != "Info") || (flags & kBytes) == 0) return std::nullopt;
  const std::uint64_t bytes = stored_number(frame, table + ((flags & kFrames) != 0 ? 12 : 8), 4, std::endian::big);
  ContainerLength length{.explained = std::min(bytes, file.size())};
  // The tag before the next file of several is no tag of this one
  length.tags = file.size() - length.explained <= kLittle || !file.read(length.explained, 3).starts_with("ID3");
  return length;
}

/// FLAC: the number of four bytes at `at`; 0 where the file ends before.
inline std::uint64_t flac_number(const UntaggedFile& file, std::uint64_t at, std::endian order = std::endian::big) {
  return stored_number(file.read(at, 4), 0, 4, order);
}

/// FLAC: where those fields of a block of metadata [begin, end) end that say how long they are, of tags and pictures.
inline std::uint64_t end_of_flac_fields(const UntaggedFile& file, std::uint64_t type, std::uint64_t begin,
                                        std::uint64_t end) {
  constexpr std::uint64_t kTags = 4, kPicture = 6;
  std::uint64_t at = begin;
  const auto skip = [&](std::endian order) { at += 4 + flac_number(file, at, order); };
  if (type == kTags) {
    skip(std::endian::little);  // who wrote it
    std::uint64_t count = flac_number(file, at, std::endian::little);
    for (at += 4; count > 0 && at < std::min(end, file.size()); --count) skip(std::endian::little);
    at += 4 * count;
  } else if (type == kPicture) {
    at += 4;                                         // what it shows
    skip(std::endian::big), skip(std::endian::big);  // the kind of file, a description
    at += 16, skip(std::endian::big);                // sizes, the picture
  }
  return at;
}

/// FLAC: where its metadata say that they end. libFLAC takes memory for them before it looks whether they are there.
inline std::uint64_t end_of_flac_metadata(const UntaggedFile& file) {
  std::uint64_t promised = 0, at = 4;
  for (bool last = false; !last && at < file.size();) {
    const std::uint64_t header = flac_number(file, at), begin = at + 4;
    last = (header >> 31) != 0;
    at = begin + (header & 0xffffff);
    promised = std::max({promised, at, end_of_flac_fields(file, header >> 24 & 0x7f, begin, at)});
  }
  return promised;
}

/// FLAC: where the last frame ends, behind which libsndfile reads nothing. What is appended may be another file, in
/// the last bytes that could still be of that frame or behind them, or a tag.
inline ContainerLength length_of_flac(const UntaggedFile& file) {
  constexpr std::string_view kBegin("fLaC\0\0\0\x22", 8);  // the name, and the block that comes first, with its size
  constexpr std::uint64_t kBlock = 1 << 20;
  const std::uint64_t promised = end_of_flac_metadata(file);
  const FileRange last = last_flac_frame(file).value_or(FileRange{kBegin.size(), file.size()});
  for (std::uint64_t at = last.begin; at < file.size(); at += kBlock) {
    const std::string bytes = file.read(at, kBlock + kBegin.size() - 1);
    if (const std::size_t found = bytes.find(kBegin); found != bytes.npos)
      return {.promised = promised, .explained = at + found, .tags = false};
  }
  const std::string frame = last.end < file.size() ? file.read(last.begin, last.end - last.begin) : "";
  const std::size_t tag = std::min(frame.find("ID3"), frame.find("APETAGEX"));
  return {.promised = promised, .explained = tag == frame.npos ? last.end : last.begin + tag};
}

/// Whether what follows the last chunk is no lost sound: tags that other programs append, or too little to matter.
inline bool is_appendix(const io::InputFile& file, std::uint64_t begin) {
  const std::string tag = file.read(begin, 8);
  return file.size() - begin <= kLittle || tag.starts_with("ID3") || tag.starts_with("TAG") ||
         tag.starts_with("APETAGEX") || tag.starts_with("LYRICS");
}

/// container_length() of what follows the tags at the beginning of a file, counted from there.
inline std::optional<ContainerLength> length_behind_tags(const UntaggedFile& file) {
  const std::string header = file.read(0, 40);
  const auto begins = [&](std::initializer_list<const char*> names) {
    return std::ranges::any_of(names, [&](const char* name) { return header.starts_with(name); });
  };
  if (begins({"RIFF", "RIFX", "RF64", "BW64"})) return length_of_wave(file, header);
  if (begins({"riff\x2e\x91\xcf\x11"})) return length_of_wave64(file, header);
  if (begins({"FORM"})) return length_of_aiff(file, header);
  if (begins({".snd", "dns."})) return length_of_au(file, header);
  if (begins({"caff"})) return length_of_chunks(file, {8, 4, 8, std::endian::big, false, 1, "data"}, 0, 0);
  if (begins({"OggS"})) return length_of_ogg(file);
  if (begins({"fLaC"})) return length_of_flac(file);
  return length_of_mp3(file);
}

}  // namespace detail

/// What a WAV (RIFF, RIFX, RF64, BW64), Wave64, AIFF, AU, CAF, Ogg, FLAC or MP3 file says of its length in bytes, also
/// behind ID3 tags; none for other files. That FLAC and MP3 are cut is seen by their number of frames, which libsndfile
/// knows.
inline std::optional<ContainerLength> container_length(const io::InputFile& file) {
  const detail::UntaggedFile untagged(file);
  std::optional<ContainerLength> length = detail::length_behind_tags(untagged);
  if (!length) return length;
  length->promised += untagged.begin();
  length->explained += untagged.begin();
  if (length->open_end) *length->open_end += untagged.begin();
  if (length->damaged_at) *length->damaged_at += untagged.begin();
  return length;
}

/// Refuses a file that ends before its headers say, or goes on where they say nothing of it: a size that has 32 bits
/// and needs more leaves the rest. Says what it found. Throws headroom.audio.file.truncated, .damaged and .length.
inline std::optional<ContainerLength> require_whole(const io::InputFile& file, const std::filesystem::path& path) {
  const std::optional<ContainerLength> length = container_length(file);
  if (!length) return length;
  require(length->promised <= file.size(), "headroom.audio.file.truncated", path, " has ", file.size(),
          " bytes, its header says ", length->promised, "; copy or download it again");
  require(!length->damaged_at, "headroom.audio.file.damaged", path, ": what begins at byte ",
          length->damaged_at.value_or(0), " is damaged, or something is missing before it; copy or download it again");
  require(length->ended, "headroom.audio.file.truncated", path, " has ", file.size(),
          " bytes, and no page that ends an Ogg stream is the last; copy or download it again");
  constexpr std::uint64_t kPadding = 8;
  const bool explained =
      file.size() - length->explained < kPadding || (length->tags && detail::is_appendix(file, length->explained));
  require(explained, "headroom.audio.file.length", path, " has ", file.size(), " bytes, its header speaks of ",
          length->explained,
          " and not of the sound that may be in the rest; write it "
          "again, e.g. ffmpeg -ignore_length 1 -i INPUT -rf64 auto OUTPUT.wav, or cut off what is no sound");
  return length;
}

}  // namespace headroom::inline v0::audio
