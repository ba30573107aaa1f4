#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <numeric>

#include "headroom/audio/channels.hpp"
#include "headroom/audio/reader.hpp"
#include "headroom/audio/resampler.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::training {

/// What all sound of a data set has in common.
struct SoundFormat {
  std::int64_t channels = 2;
  std::int64_t sample_rate = 44100;  ///< Hz
  bool convert = false;              ///< take files of another sample rate and, of one and two, number of channels
};

/// A file that holds one stem of a track, or its mixture.
struct StemFile {
  std::filesystem::path path;
  std::int64_t frames = 0;  ///< at the data set's sample rate
  int sample_rate = 0;      ///< of the file, Hz
};

/// Looks at the header of a file. Throws headroom.audio.file.* and headroom.training.dataset.differs.
inline StemFile open_stem_file(const std::filesystem::path& path, const SoundFormat& format) {
  const audio::AudioReader reader(path);
  const int rate = static_cast<int>(format.sample_rate);
  if (!format.convert) audio::require_sample_rate(reader, rate);
  const bool fits = reader.channels() == format.channels ||
                    (format.convert && std::max<std::int64_t>(reader.channels(), format.channels) == 2);
  require(fits, "headroom.training.dataset.differs", path, " has ", reader.channels(), " channels, expected ",
          format.channels, " channels as configured; export the track again, remove it, or, where one of the two is 1 ",
          "and the other 2, set data.convert");
  return {path, audio::resampled_length(reader.frames(), reader.sample_rate(), rate), reader.sample_rate()};
}

namespace detail {

/// The samples first, …, first + count - 1 of a file at another rate: [C,n]. The piece that is resampled begins where a
/// sample of the file and one of the result meet, and is longer at both ends than the filters.
inline torch::Tensor read_resampled(audio::AudioReader& reader, std::int64_t first, std::int64_t count, int rate) {
  const std::int64_t common = std::gcd(reader.sample_rate(), rate);
  const std::int64_t from = reader.sample_rate() / common, to = rate / common;  // so many samples last equally long
  const std::int64_t margin = 4096 * ((from + to - 1) / to);                    // samples of the file
  const std::int64_t meeting = std::max<std::int64_t>(0, first / to - (margin + from - 1) / from);
  const std::int64_t end =
      std::min(reader.frames(), audio::resampled_length(first + count, rate, reader.sample_rate()) + margin);
  reader.seek(meeting * from);
  audio::Resampler resampler(reader.channels(), reader.sample_rate(), rate);
  const torch::Tensor ready = resampler.push(reader.read(end - meeting * from));
  return torch::cat({ready, resampler.finish()}, 1).narrow(1, first - meeting * to, count).clone();
}

}  // namespace detail

/// The samples first, …, first + count - 1 of a file as the data set has them: float [C,n]. Nothing else of the file is
/// read. Throws headroom.audio.file.*.
inline torch::Tensor read_piece(const StemFile& file, std::int64_t first, std::int64_t count,
                                const SoundFormat& format) {
  audio::AudioReader reader(file.path, audio::WholeFile::known);
  torch::Tensor samples;
  if (reader.sample_rate() == format.sample_rate) {
    reader.seek(first);
    samples = reader.read(count);
  } else {
    samples = detail::read_resampled(reader, first, count, static_cast<int>(format.sample_rate));
  }
  return audio::with_channels(samples, format.channels).contiguous();
}

}  // namespace headroom::inline v0::training
