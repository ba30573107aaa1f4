#pragma once

#include <sndfile.h>

#include <cstdint>

namespace headroom::inline v0::audio {

/// How samples are stored: the first three in a WAV file, the others in FLAC. Integers are rounded to nearest without
/// dither and clipped at full scale, so that what was read from a file of the same kind is written back bit by bit.
enum class Encoding { pcm16, pcm24, float32, flac16, flac24 };

inline bool is_flac(Encoding encoding) { return encoding == Encoding::flac16 || encoding == Encoding::flac24; }

/// What the name of a file ends with.
inline const char* extension_of(Encoding encoding) { return is_flac(encoding) ? ".flac" : ".wav"; }

/// Bytes that a sample takes, before FLAC compresses it.
inline int bytes_per_sample(Encoding encoding) {
  return encoding == Encoding::float32 ? 4 : encoding == Encoding::pcm16 || encoding == Encoding::flac16 ? 2 : 3;
}

/// What an AudioWriter writes.
struct AudioFormat {
  int channels = 2;         ///< FLAC has at most 8
  int sample_rate = 44100;  ///< Hz
  Encoding encoding = Encoding::float32;
};

namespace detail {

inline std::uint64_t sample_bytes(const AudioFormat& format, std::int64_t frames) {
  return static_cast<std::uint64_t>(frames) * static_cast<std::uint64_t>(format.channels) *
         static_cast<std::uint64_t>(bytes_per_sample(format.encoding));
}

/// What libsndfile is told of a file of `frames`; beyond 4 GiB a WAV file is RF64.
inline SF_INFO sound_file_info(const AudioFormat& format, std::int64_t frames) {
  constexpr std::uint64_t wav_limit = 0xffffffff - 4096;  // sizes have 32 bits; the rest is room for the header
  const int bytes = bytes_per_sample(format.encoding);
  SF_INFO info{};
  info.channels = format.channels;
  info.samplerate = format.sample_rate;
  info.format = (is_flac(format.encoding)                   ? SF_FORMAT_FLAC
                 : sample_bytes(format, frames) > wav_limit ? SF_FORMAT_RF64
                                                            : SF_FORMAT_WAV) |
                (bytes == 4   ? SF_FORMAT_FLOAT
                 : bytes == 3 ? SF_FORMAT_PCM_24
                              : SF_FORMAT_PCM_16);
  return info;
}

}  // namespace detail

}  // namespace headroom::inline v0::audio
