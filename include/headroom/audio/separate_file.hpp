#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <system_error>
#include <vector>

#include "headroom/audio/file.hpp"
#include "headroom/audio/separator.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// Told after each segment how many of the frames are finished.
using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

/// Separates an audio file into one WAV file a stem, in the memory of one segment. A mono file is separated as if all
/// its channels were the same. Files appear under their names when all of the recording is done. Returns how many
/// samples an integer encoding clipped.
/// Throws `headroom.audio.file.*`, `headroom.audio.separator.channels`, `headroom.audio.separator.outputs` (not one
/// path a stem, one twice, or the input), and like the streaming form.
template <class Model>
std::int64_t separate_file(const std::filesystem::path& input, const std::vector<std::filesystem::path>& outputs,
                           Model&& model, const SeparatorOptions& options, int sample_rate,
                           Encoding encoding = Encoding::float32, const Progress& progress = {}) {
  AudioReader reader(input);
  require_sample_rate(reader, sample_rate);
  require(reader.channels() == 1 || reader.channels() == options.channels, "headroom.audio.separator.channels", input,
          " has ", reader.channels(), " channels, expected 1 or ", options.channels, "; convert it: sox INPUT -c ",
          options.channels, " OUTPUT.wav");
  constexpr auto id = "headroom.audio.separator.outputs";
  require(static_cast<std::int64_t>(outputs.size()) == options.stems, id, "got ", outputs.size(), " output paths for ",
          options.stems, " stems, expected one each");
  for (auto path = outputs.begin(); path != outputs.end(); ++path) {
    std::error_code missing;  // an output that does not exist yet is not the input
    require(!std::filesystem::equivalent(*path, input, missing), id, *path,
            " is the input, it would be replaced; choose another output folder");
    require(std::find(outputs.begin(), path, *path) == path, id, *path, " is given for two stems");
  }

  const AudioFormat format{static_cast<int>(options.channels), sample_rate, encoding};
  detail::require_room(outputs.front(), static_cast<std::uint64_t>(options.stems * options.channels *
                                                                   bytes_per_sample(encoding) * reader.frames()));
  std::vector<AudioWriter> writers;
  for (const auto& path : outputs) {
    writers.emplace_back(path, format, reader.frames());
  }
  separate([&](std::int64_t frames) { return reader.read(frames); }, model, options,
           [&](const torch::Tensor& stems) {
             for (std::size_t n = 0; n < writers.size(); ++n) {
               writers[n].write(stems[static_cast<std::int64_t>(n)]);
             }
             if (progress) {
               progress(writers.front().written(), reader.frames());
             }
           });
  std::int64_t clipped = 0;
  for (AudioWriter& writer : writers) {
    writer.finish();
    clipped += writer.clipped();
  }
  for (AudioWriter& writer : writers) {
    writer.publish();
  }
  return clipped;
}

}  // namespace headroom::inline v0::audio
