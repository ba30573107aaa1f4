#pragma once

#include <torch/torch.h>

#include <filesystem>

#include "headroom/audio/format.hpp"
#include "headroom/audio/reader.hpp"
#include "headroom/audio/writer.hpp"
#include "headroom/core/error.hpp"

namespace headroom::inline v0::audio {

/// A recording in memory.
struct Recording {
  torch::Tensor samples;  ///< float [C,T], full scale is 1
  int sample_rate = 0;    ///< Hz
};

/// The whole of a file. Throws those of AudioReader.
inline Recording read_audio(const std::filesystem::path& path) {
  AudioReader reader(path);
  return {reader.read(reader.frames()), reader.sample_rate()};
}

/// Writes `samples` [C,T] as a WAV file, whole or not at all. Throws those of AudioWriter.
inline void write_audio(const std::filesystem::path& path, const torch::Tensor& samples, int sample_rate,
                        Encoding encoding = Encoding::float32) {
  require(samples.dim() == 2, "headroom.audio.file.samples", "got samples ", samples.sizes(), " for ", path,
          ", expected [channels, frames]");
  AudioWriter writer(path, {static_cast<int>(samples.size(0)), sample_rate, encoding}, samples.size(1));
  writer.write(samples);
  writer.close();
}

}  // namespace headroom::inline v0::audio
