#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "headroom/audio/untagged_file.hpp"

// What a FLAC file (RFC 9639) says of where its last frame lies, without decoding it.
namespace headroom::inline v0::audio::detail {

/// What the first block of metadata, STREAMINFO, says of the stream.
struct FlacStream {
  std::uint64_t block;        ///< samples of each frame but the last, where all have the same number
  std::uint64_t frame_bytes;  ///< of the largest frame
  std::uint64_t total;        ///< samples of a channel, 0 for not known
  static constexpr std::size_t kBegin = 8, kSize = 34;  ///< bytes
};

/// The stream of a file that begins with `header`.
inline FlacStream flac_stream(std::string_view header) {
  const auto bits = [&](std::size_t first, std::size_t count) {
    std::uint64_t value = 0;
    for (std::size_t bit = first; bit < first + count; ++bit) {
      const auto byte = static_cast<unsigned char>(header[FlacStream::kBegin + bit / 8]);
      value = value << 1 | (byte >> (7 - bit % 8) & 1);
    }
    return value;
  };
  const std::uint64_t largest_block = bits(16, 16), stated = bits(56, 24);
  const std::uint64_t channels = bits(100, 3) + 1, sample_bits = bits(103, 5) + 1;
  // Without compression a channel has one bit a sample more (stereo as mid and side), and less than 100 bytes around it
  const std::uint64_t most = channels * (largest_block * (sample_bits + 1) / 8 + 100);
  return {bits(0, 16), stated > 0 ? stated : most, bits(108, 36)};
}

/// The checksum of a frame's header, whose last byte it is: 0 for one that is as it was written.
inline unsigned char flac_header_checksum(std::string_view header) {
  unsigned char sum = 0;
  for (const char byte : header) {
    sum ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) sum = static_cast<unsigned char>(sum << 1 ^ (sum >> 7) * 0x07);
  }
  return sum;
}

/// Up to this many bytes a frame's header has.
inline constexpr std::size_t kFlacHeader = 16;

/// Whether `bytes` begin with the header of the frame that holds the stream's last sample.
inline bool is_last_flac_frame(std::string_view bytes, const FlacStream& stream) {
  const auto byte = [&](std::size_t i) {
    return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : std::uint64_t{0};
  };
  if (byte(0) != 0xff || (byte(1) & 0xfe) != 0xf8) return false;
  const bool counts_samples = (byte(1) & 1) != 0;
  // The frame's number, or that of its first sample, as UTF-8 writes characters
  std::size_t at = 5;
  std::uint64_t number = byte(4);
  if (number >= 0x80) {
    std::size_t more = 0;
    while (more < 7 && (number >> (6 - more) & 1) != 0) ++more;
    if (more == 0 || more > 6) return false;
    number &= 0x3f >> more;
    for (; more > 0; --more, ++at) {
      if ((byte(at) & 0xc0) != 0x80) return false;
      number = number << 6 | (byte(at) & 0x3f);
    }
  }
  const std::uint64_t code = byte(2) >> 4, rate = byte(2) & 15;
  std::uint64_t block = 192;
  if (code == 0) return false;
  if (code > 1) block = code < 6 ? 576 << (code - 2) : 256 << (code & 7);
  if (code == 6) block = byte(at++) + 1;
  if (code == 7) block = (byte(at) << 8 | byte(at + 1)) + 1, at += 2;
  at += rate == 12 ? 1 : rate == 13 || rate == 14 ? 2 : 0;
  return (counts_samples ? number : number * stream.block) + block == stream.total && at < bytes.size() &&
         flac_header_checksum(bytes.substr(0, at + 1)) == 0;
}

/// A piece of a file, in bytes.
struct FileRange {
  std::uint64_t begin, end;
};

/// Where the last frame of the FLAC stream at the beginning of `file` is; it may end before `end`. None where the file
/// does not say how many samples it has, or ends before that frame.
inline std::optional<FileRange> last_flac_frame(const UntaggedFile& file) {
  constexpr std::uint64_t kBlock = 1 << 20;
  constexpr std::uint64_t kFirst = FlacStream::kBegin + FlacStream::kSize;
  const std::string header = file.read(0, kFirst);
  if (header.size() < kFirst) return std::nullopt;
  const FlacStream stream = flac_stream(header);
  if (stream.total == 0) return std::nullopt;
  for (std::uint64_t begin = kFirst; begin < file.size(); begin += kBlock) {
    const std::string bytes = file.read(begin, kBlock + kFlacHeader);
    for (std::size_t at = bytes.find('\xff'); at < kBlock; at = bytes.find('\xff', at + 1)) {
      if (!is_last_flac_frame(std::string_view(bytes).substr(at, kFlacHeader), stream)) continue;
      return FileRange{begin + at, std::min(begin + at + stream.frame_bytes, file.size())};
    }
  }
  return std::nullopt;
}

}  // namespace headroom::inline v0::audio::detail
